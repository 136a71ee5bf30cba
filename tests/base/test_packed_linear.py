"""Packed layers say what plain ones say, and only where nothing can tell the difference but the clock."""

from __future__ import annotations

import copy
import platform

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_softprompt import attach
from lightning_softprompt.base import packed_linear
from lightning_softprompt.base.packed_linear import pack_linear_layers
from tests import tiny
from tests.inference.tasks import HARD
from tests.serving.helpers import prompts_of

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(), reason="oneDNN on x86"
)


def packed(layer: nn.Module) -> nn.Module:
    pack_linear_layers(layer)
    return layer


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 1, 9), (0,)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_packed_layer_is_the_product_in_float64(bias: bool, shape: tuple[int, ...]) -> None:
    layer = packed(nn.Linear(48, 31, bias=bias))
    assert "forward" in vars(layer)
    given = torch.randn(*shape, 48)
    expected = functional.linear(given.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert layer(given).shape == expected.shape and layer(given).dtype == torch.float32
    assert not shape[0] or tiny.relative_error(layer(given).double(), expected) < 1e-6
    strided = torch.randn(48, 6).T
    assert tiny.relative_error(layer(strided), layer(strided.contiguous())) < 1e-6


def test_the_packed_weights_are_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed(nn.Linear(8, 8).requires_grad_(False))
    monkeypatch.setattr(packed_linear.functional, "linear", lambda *_: pytest.fail("multiplied by MKL"))
    given = torch.randn(2, 8, requires_grad=True)
    layer(given).sum().backward()
    with torch.inference_mode():
        layer(given.detach())


@pytest.mark.parametrize("change", ["write", "replace", "resize", "load", "swap"])
def test_a_weight_that_changes_is_packed_anew(change: str) -> None:
    layer = packed(nn.Linear(8, 8).requires_grad_(False))
    given, weight = torch.randn(2, 8, requires_grad=True), torch.randn(9 if change == "resize" else 8, 8)
    layer(given).sum().backward()
    given.grad = None
    if change == "write":
        layer.weight.copy_(weight)
    elif change == "load":
        layer.load_state_dict({"weight": weight, "bias": layer.bias})
    elif change == "swap":
        product = torch.func.functional_call(layer, {"weight": weight}, (given,))
        assert tiny.relative_error(product.detach(), functional.linear(given.detach(), weight, layer.bias)) < 1e-6
        weight = layer.weight
    else:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(torch.randn(len(weight)), requires_grad=False)
    product = layer(given)
    assert tiny.relative_error(product.detach(), functional.linear(given.detach(), weight, layer.bias)) < 1e-6
    product.sum().backward()
    assert tiny.relative_error(given.grad, weight.sum(0).expand(2, -1)) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_trains_is_read_as_it_is_without_gradients_too(bias: bool) -> None:
    layer = packed(nn.Linear(8, 8, bias=bias))
    if bias:
        layer.bias.requires_grad_(False).zero_()
    with torch.no_grad():
        layer.weight.data.zero_()
        assert not layer(torch.randn(2, 8)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_that_is_cast_multiplies_as_before(dtype: torch.dtype) -> None:
    layer = packed(nn.Linear(8, 8).requires_grad_(False))
    layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    layer.to(dtype)
    given = torch.randn(2, 8, dtype=dtype, requires_grad=True)
    layer(given).sum().backward()
    assert tiny.relative_error(given.grad, layer.weight.sum(0).expand(2, -1)) < 1e-2


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_in_float64(bias: bool) -> None:
    layer = packed(nn.Linear(48, 31, bias=bias).requires_grad_(False))
    given = torch.randn(3, 5, 48, requires_grad=True)
    upstream = torch.randn(5, 3, 31).transpose(0, 1)  # as a transposed view hands it on
    product = layer(given)
    assert "_Product" in product.grad_fn.name()
    product.backward(upstream)
    assert tiny.relative_error(given.grad.double(), upstream.double() @ layer.weight.double()) < 1e-6
    empty = torch.zeros(0, 48, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, 48)


def test_gradients_of_gradients_pass() -> None:
    layer = packed(nn.Linear(6, 6).requires_grad_(False)).forward
    given = torch.randn(2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(given).pow(3).sum(), given, create_graph=True)
    (found,) = torch.autograd.grad(gradient.pow(2).sum(), given)
    exact = given.detach().double().requires_grad_()
    product = functional.linear(exact, layer._layer.weight.double(), layer._layer.bias.double())
    (gradient,) = torch.autograd.grad(product.pow(3).sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.pow(2).sum(), exact)
    assert tiny.relative_error(found.double(), expected) < 1e-5


def test_a_layer_that_trains_multiplies_by_what_it_has() -> None:
    layer = packed(nn.Linear(8, 8))
    given = torch.randn(2, 8)
    layer(given).sum().backward()
    assert tiny.relative_error(layer.weight.grad, given.sum(0).expand(8, -1)) < 1e-6
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(given), layer.bias.expand(2, -1))


def test_a_copy_is_packed_by_itself() -> None:
    layer = packed(nn.Linear(8, 8).requires_grad_(False))
    given = torch.randn(2, 8, requires_grad=True)
    layer(given).sum().backward()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(2)
        assert tiny.relative_error(other(given) - other.bias, 2 * (layer(given) - layer.bias)) < 1e-6


def test_a_compiled_model_multiplies_as_before() -> None:
    layer = packed(nn.Linear(8, 8).requires_grad_(False))
    given = torch.randn(2, 8, requires_grad=True)
    found = torch.compile(layer, backend="eager", fullgraph=True)(given)
    assert torch.equal(found.detach(), functional.linear(given, layer.weight, layer.bias).detach())


@torch.no_grad()
def test_autocast_is_what_it_is_without() -> None:
    layer, given = nn.Linear(8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(given)
        found = packed(layer)(given)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@torch.no_grad()
def test_what_is_not_a_plain_layer_in_float32_stays() -> None:
    class Quantized(nn.Linear):
        pass

    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 8)
    for layer in (Quantized(8, 8), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8, device="meta"), empty):
        assert "forward" not in vars(packed(layer))


@torch.no_grad()
def test_a_forward_that_somebody_set_stays() -> None:
    layer = nn.Linear(8, 8)
    layer.forward = hooked = lambda given: given + 1  # as accelerate does to move inputs
    assert packed(layer).forward is hooked


@pytest.mark.parametrize("prefix", ["auto", "never"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_answers_as_before(kind: str, prefix) -> None:
    bare = tiny.tiny_model(kind)
    model = attach(packed(tiny.tiny_model(kind)), prompts_of(HARD, bare), prefix)
    batch, seen = tiny.random_batch(3, "left"), []
    tasks = list(HARD)
    model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, tasks=[tasks[0]] * 6).logits
        for row, ids in zip(range(6), [row.text for row in batch.rows], strict=True):
            alone = bare(torch.tensor([[*HARD[tasks[0]], *ids]])).logits[0, -1]
            assert tiny.relative_error(logits[row, -1], alone) < 1e-5
    assert seen  # hooks run

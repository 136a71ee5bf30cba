"""The loss behind a frozen head, in chunks of positions, against float64 and against the loss of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from lightning_softprompt import SoftPromptError, pack_linear_layers
from lightning_softprompt.attachment import frozen_head
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.attachment.frozen_head import summed_cross_entropy
from tests import tiny
from tests.attachment.helpers import attached_copy, inputs

SMALL = dict(
    vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=1, initializer_range=0.3,
)  # fmt: skip


class Largest(TorchDispatchMode):
    """The most rows of a vocabulary that one tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_new = function is not torch.ops.aten.t.default  # the head's own weight, turned
        if isinstance(result, Tensor) and result.ndim > 1 and result.shape[-1] == tiny.VOCABULARY and is_new:
            self.rows = max(self.rows, result.numel() // tiny.VOCABULARY)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_loss_and_gradient_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_bias: bool, rows: int
) -> None:
    monkeypatch.setattr(frozen_head, "_LEAST_ROWS", rows)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=has_bias).requires_grad_(False).to(dtype)
    hidden, targets = torch.randn(13, 16).to(dtype).requires_grad_(), torch.randint(50, (13,))
    found = summed_cross_entropy(hidden, head, targets)
    (found / 7).backward()
    exact = hidden.detach().double().requires_grad_()
    bias = head.bias.double() if has_bias else None
    expected = functional.cross_entropy(functional.linear(exact, head.weight.double(), bias), targets, reduction="sum")
    (expected / 7).backward()
    assert hidden.grad is not None and exact.grad is not None and hidden.grad.dtype == dtype
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-6
    assert tiny.relative_error(found.detach(), expected.detach()) < limit
    assert tiny.relative_error(hidden.grad, exact.grad) < limit


@pytest.mark.parametrize("prefix", ["always", "never"])
def test_a_step_has_the_logits_of_one_chunk(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.setattr(frozen_head, "_LEAST_ROWS", 5)
    batch = tiny.random_batch(0, "right")
    results = []
    for logits in ("all", "labels"):
        model, prompts = attached_copy(tiny.tiny_model(), prefix, logits)
        model(**inputs(batch, labels=True)).loss.backward()  # finds out what kind of head it is
        with Largest() as largest:
            loss = model(**inputs(batch, labels=True)).loss
            loss.backward()
        results.append((loss.detach(), torch.cat([prompts[task].grad for task in prompts])))
        assert (largest.rows > 20) == (logits == "all"), largest.rows
        assert logits == "all" or largest.rows <= len(batch.rows)  # behind a prefix, first tokens of rows
    assert tiny.relative_error(results[1][0], results[0][0]) < 1e-6
    assert tiny.relative_error(results[1][1], results[0][1]) < 1e-5


@pytest.mark.parametrize("base", [
    Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0, head_dim=8)),
    CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5)),
], ids=["capped", "scaled"])  # fmt: skip
def test_logits_that_are_not_the_heads_are_computed_by_the_model(base: Any) -> None:
    batch, losses = tiny.random_batch(0, "right", ragged=False), []
    for logits in ("all", "labels"):
        model, prompts = attached_copy(base.eval(), "auto", logits)
        out = model(**inputs(batch, labels=True))
        out.loss.backward()
        losses.append((out.loss.detach(), torch.cat([prompts[task].grad for task in prompts])))
        assert not attachment_of(model)._head.is_plain()
    assert tiny.relative_error(losses[1][0], losses[0][0]) < 1e-6
    assert tiny.relative_error(losses[1][1], losses[0][1]) < 1e-5


def test_a_plain_head_and_those_that_are_none() -> None:
    model, _ = attached_copy(tiny.tiny_model(), "auto", "labels")
    head = attachment_of(model)._head
    assert head.is_plain() and attachment_of(attached_copy(tiny.tiny_model("gpt2"))[0])._head.is_plain()
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    assert not head.is_plain()
    handle.remove()
    assert head.is_plain()
    with torch.autocast("cpu", torch.float16):
        assert not head.is_plain()
    with torch.autocast("cpu", torch.bfloat16):
        assert head.is_plain()
    model.lm_head.weight.requires_grad_(True)
    assert not head.is_plain()
    model.lm_head = nn.Sequential(model.lm_head.requires_grad_(False))
    assert not head.is_plain()


def test_under_autocast_the_loss_is_that_of_all_logits() -> None:
    batch, losses = tiny.random_batch(0, "right"), []
    for logits in ("all", "labels"):
        model, prompts = attached_copy(tiny.tiny_model(), "never", logits)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs(batch, labels=True)).loss
        loss.backward()
        losses.append((loss.detach(), torch.cat([prompts[task].grad for task in prompts])))
    assert tiny.relative_error(losses[1][0], losses[0][0]) < 1e-3
    assert tiny.relative_error(losses[1][1], losses[0][1]) < 2e-2


def test_gradients_of_gradients_are_refused() -> None:
    model, prompts = attached_copy(tiny.tiny_model(), "never", "labels")
    loss = model(**inputs(tiny.random_batch(0, "right"), labels=True)).loss
    with pytest.raises(SoftPromptError, match=r"create_graph=True\) need all logits"):
        torch.autograd.grad(loss, [prompts[task] for task in prompts], create_graph=True)


def test_a_loss_of_the_users_own_is_computed_from_all_logits() -> None:
    model, _ = attached_copy(tiny.tiny_model(), "never", "labels")
    model.loss_function = lambda logits, labels, vocab_size, shift_labels, **rest: logits.sum() * 0 + 7.0
    assert float(model(**inputs(tiny.random_batch(0, "right"), labels=True)).loss.detach()) == 7.0


def test_what_is_known_of_a_head_is_known_of_its_state_alone() -> None:
    base = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=1.0)).eval()
    batch = tiny.random_batch(0, "right", ragged=False)
    both = [attached_copy(base, "auto", logits)[0] for logits in ("all", "labels")]
    for scale in (1.0, 0.25):
        for model in both:
            model.logit_scale = scale
        losses = [model(**inputs(batch, labels=True)).loss.detach() for model in both]
        assert tiny.relative_error(losses[1], losses[0]) < 1e-6
        assert attachment_of(both[1])._head.is_plain() == (scale == 1.0)
    passes = []
    both[1].model.register_forward_hook(lambda *_: passes.append(1))
    both[1](**inputs(batch, labels=True))
    passes.clear()
    for _ in range(3):
        both[1](**inputs(batch, labels=True))
    assert len(passes) <= 6, "that a head is not plain is found out once"  # texts, and prompts as a prefix


def test_a_packed_head_under_autocast_is_the_plain_one() -> None:
    bare = tiny.tiny_model()
    batch = tiny.random_batch(0, "right")
    found = []
    for packs in (False, True):
        model, prompts = attached_copy(bare, logits="labels")
        if packs:
            pack_linear_layers(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs(batch, labels=True)).loss
        loss.backward()
        found.append((loss.detach(), *(prompts[task].grad for task in prompts)))
    for one, other in zip(*found, strict=True):
        assert tiny.relative_error(one, other) < 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_packed_head_is_read_in_chunks_too(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(frozen_head, "_LEAST_ROWS", 4)
    bare = tiny.tiny_model(kind)
    batch = tiny.random_batch(0, "right")
    found = {}
    for packs in (False, True):
        model, prompts = attached_copy(bare, logits="labels")
        if packs:
            pack_linear_layers(model)
        model(**inputs(batch, labels=True)).loss.backward()  # finds out about the head, and packs it
        prompts.zero_grad()
        with Largest() as largest:
            loss = model(**inputs(batch, labels=True)).loss
        loss.backward()
        found[packs] = loss.detach(), {task: prompts[task].grad for task in prompts}
        assert 0 < largest.rows < int((batch.labels != -100).sum()) // 2
    assert tiny.relative_error(found[True][0], found[False][0]) < 1e-5
    for task, gradient in found[True][1].items():
        assert tiny.relative_error(gradient, found[False][1][task]) < 1e-5

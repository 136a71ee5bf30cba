"""The operator that torch sees: opcheck, torch.compile, autocast, inference mode, copies; and where it runs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
from softprompt_kernels import prompt_concat
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from tests.kernels.oracle import gradient_case


def op_arguments(device: str, is_table: bool, has_mask: bool, requires_grad: bool) -> list[object]:
    case = gradient_case("left", torch.float32, batch=3).to(device)
    if is_table:
        case.embeddings = torch.randn(9, 6, device=device)
        case.input_ids = torch.arange(15, device=device).reshape(3, 5) % 9
    elif requires_grad:
        case.embeddings.requires_grad_()
    if has_mask:
        case.labels = torch.arange(15, device=device).reshape(3, 5)
    else:
        case.attention_mask = None
    case.prompts.requires_grad_(requires_grad)
    return list(vars(case).values())[:7]


@pytest.mark.parametrize("form", ["padding", "boolean", "additive"])
@pytest.mark.parametrize("is_table", [False, True])
def test_opcheck(device: str, is_table: bool, form: str) -> None:
    operator = torch.ops.softprompt_kernels.prompt_concat.default
    for has_mask, requires_grad in ((True, True), (False, True), (True, False)):
        opcheck(operator, (*op_arguments(device, is_table, has_mask, requires_grad), has_mask, 5, form))


def test_opcheck_of_the_gradients(device: str) -> None:
    gradient, spans = torch.randn(2, 5, 6, device=device), torch.tensor([[0, 2, 0], [1, 2, 0]], device=device)
    offsets, tasks = torch.tensor([0, 2, 3], device=device), torch.tensor([0, 1], device=device)
    opcheck(torch.ops.softprompt_kernels.prompt_gradient.default, (gradient, spans, offsets, tasks, 3))
    opcheck(torch.ops.softprompt_kernels.text_gradient.default, (gradient, spans, 3))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.compiles
def test_compiles_whole_with_dynamic_batch_and_length(device: str, backend: str) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]):
        nonlocal graphs
        graphs += 1
        return graph.forward

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=count)
    def compiled(text: Tensor, prompts: Tensor, offsets: Tensor, tasks: Tensor, mask: Tensor, labels: Tensor):
        out = prompt_concat(
            text, None, prompts, offsets, tasks, mask, labels, padding_side="left", max_prompt_length=5, backend=backend
        )
        return out.inputs_embeds * 2, out.position_ids, out.labels

    for batch, length in ((2, 3), (3, 4), (5, 7)):
        case = gradient_case("left", torch.float32, batch).to(device)
        text, mask = torch.randn(batch, length, 6, device=device), torch.ones(batch, length, device=device).long()
        mask[0, 0] = 0
        given = (case.offsets, case.task_ids, mask, mask * 4)
        found = []
        for run in (compiled, compiled._torchdynamo_orig_callable):
            prompts = case.prompts.clone().requires_grad_()
            embeds, positions, labels = run(text, prompts, *given)
            embeds.square().sum().backward()
            found.append((embeds.detach(), positions, labels, prompts.grad))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert graphs == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own imports, torch 2.13
@pytest.mark.compiles
def test_compiles_with_inductor(device: str, tmp_path, monkeypatch) -> None:
    # PyTorch 2.13 takes what it compiled for other vector instructions (ATEN_CPU_CAPABILITY) out of its cache.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = gradient_case("right", torch.float32, 3).to(device)
    case.attention_mask = None
    case.prompts.requires_grad_()
    given = {name: value for name, value in vars(case).items() if name != "prompts"}

    @torch.compile(fullgraph=True)
    def compiled(prompts: Tensor) -> Tensor:
        return prompt_concat(**given, prompts=prompts, backend="triton").inputs_embeds.sin()

    found = torch.autograd.grad(compiled(case.prompts).sum(), case.prompts)[0]
    expected = prompt_concat(**vars(case), backend="reference").inputs_embeds.sin().sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, case.prompts)[0])


def test_autocast_and_inference_mode_change_nothing(device: str) -> None:
    case = gradient_case("left", torch.float32, 3).to(device)
    case.prompts.requires_grad_()
    expected = prompt_concat(**vars(case), backend="reference")
    with torch.autocast(device, torch.bfloat16):
        out = prompt_concat(**vars(case), backend="triton")
        out.inputs_embeds.sum().backward()
    assert out.inputs_embeds.dtype == torch.float32 and torch.equal(out.inputs_embeds, expected.inputs_embeds)
    assert case.prompts.grad is not None
    with torch.inference_mode():
        out = prompt_concat(**vars(case), backend="triton")
    assert out.inputs_embeds.is_inference() and torch.equal(out.inputs_embeds, expected.inputs_embeds)


def test_the_additive_mask_carries_no_gradient(device: str) -> None:
    case = gradient_case("left", torch.float32, 3).to(device)
    case.prompts.requires_grad_()
    case.mask_form = "additive"
    for backend in ("triton", "reference"):
        out = prompt_concat(**vars(case), backend=backend)
        assert out.inputs_embeds.requires_grad and not out.attention_mask.requires_grad


def test_a_table_without_its_look_up_has_no_gradient(device: str) -> None:
    given = op_arguments(device, True, True, True)
    given[0].requires_grad_()
    out = torch.ops.softprompt_kernels.prompt_concat(*given, True, 5, "padding")
    with pytest.raises(NotImplementedError, match="no gradient for a table"):
        out[0].sum().backward()


def test_values_are_checked_where_asked(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gradient_case("left", torch.float32, 3).to(device)
    case.task_ids = case.task_ids + 9
    monkeypatch.setenv("SOFTPROMPT_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"^task_ids "):
        prompt_concat(**vars(case), backend="triton")
    monkeypatch.delenv("SOFTPROMPT_KERNELS_DEBUG")
    if device == "cuda":
        prompt_concat(**vars(case), backend="triton")


def test_cpu_tensors_need_the_interpreter() -> None:
    program = """
import torch, softprompt_kernels
softprompt_kernels.prompt_concat(
    torch.zeros(1, 2, 4), None, torch.zeros(2, 4), torch.tensor([0, 2]), torch.tensor([0]),
    padding_side="left", max_prompt_length=2, backend="triton")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "ValueError: backend 'triton' needs tensors on a GPU" in done.stderr


def test_tensors_without_values_are_laid_out_by_shape() -> None:
    with FakeTensorMode() as mode:
        fake = [
            mode.from_tensor(each) if isinstance(each, Tensor) else each
            for each in op_arguments("cpu", True, True, True)
        ]
        out = prompt_concat(*fake, padding_side="left", max_prompt_length=5, backend="triton")
        out.inputs_embeds.sum().backward()
    assert out.inputs_embeds.shape == (3, 10, 6) and fake[2].grad.shape == fake[2].shape


class OtherTensor(Tensor):
    """A tensor of another type that has values, as quantized ones are."""


def test_values_of_other_types_of_tensors_are_checked() -> None:
    arguments = op_arguments("cpu", True, True, False)
    arguments[0] = arguments[0].as_subclass(OtherTensor)
    arguments[4] = arguments[4] + 100
    with pytest.raises(ValueError, match="task_ids"):
        prompt_concat(*arguments, padding_side="left", max_prompt_length=5)

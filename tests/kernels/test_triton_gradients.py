"""The Triton kernels of the gradients against float64 autograd, and run where a gradient is wanted alone."""

from __future__ import annotations

import pytest
import torch
from softprompt_kernels import prompt_concat, triton_gradients

from tests.kernels.oracle import gradient_case


@pytest.mark.parametrize(("batch", "hidden"), [(7, 6), (20, 6), (5, 576)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_against_float64_autograd(device: str, side: str, batch: int, hidden: int) -> None:
    def run(dtype: torch.dtype, prompt_dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        case = gradient_case(side, dtype, batch)
        generator = torch.Generator().manual_seed(2)
        case.embeddings = torch.randn(batch, 5, hidden, generator=generator).to(dtype).requires_grad_()
        case.prompts = torch.randn(9, hidden, generator=generator).to(prompt_dtype).requires_grad_()
        if backend == "triton":
            case = case.to(device)
            case.embeddings, case.prompts = (x.detach().requires_grad_() for x in (case.embeddings, case.prompts))
        out = prompt_concat(**vars(case), backend=backend)
        weight = torch.randn(batch, 10, hidden, generator=generator).to(dtype)
        (out.inputs_embeds * weight.to(out.inputs_embeds.device)).sum().backward()
        return [case.prompts.grad.cpu(), case.embeddings.grad.cpu()]

    expected = run(torch.float64, torch.float64, "reference")
    found, again = (run(torch.float32, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-6
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        low = run(dtype, torch.float32, "triton")[0]
        assert low.dtype == torch.float32
        assert float((low - expected[0]).norm() / expected[0].norm()) < bound
    # Prompts kept in bfloat16 get a gradient that was summed in float32 and rounded once.
    low = run(torch.bfloat16, torch.bfloat16, "triton")[0]
    assert low.dtype == torch.bfloat16 and float((low - expected[0]).norm() / expected[0].norm()) < 4e-3


@pytest.mark.usefixtures("small_blocks")
def test_many_rows_of_one_task_are_summed_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    empty = torch.Tensor.new_empty

    def noted(tensor: torch.Tensor, *shape, **options) -> torch.Tensor:
        parts.append(shape)
        return empty(tensor, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    rows = 700 if device == "cuda" else 70
    gradient = torch.randn(rows, 3, 8, device=device)
    spans = torch.tensor([[0, 2, 0]], device=device).repeat(rows, 1)
    offsets, tasks = torch.tensor([0, 2], device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    found = triton_gradients.prompt_gradient(gradient, spans, offsets, tasks, 2)
    assert parts[0][0] > 1
    expected = gradient[:, :2].double().sum(0)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert torch.equal(found, triton_gradients.prompt_gradient(gradient, spans, offsets, tasks, 2))


def test_a_frozen_text_gets_no_gradient_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise AssertionError("the gradient of frozen embeddings was computed")

    monkeypatch.setattr(triton_gradients, "text_gradient", refuse)
    case = gradient_case("left", torch.float32).to(device)
    case.prompts.requires_grad_()
    prompt_concat(**vars(case), backend="triton").inputs_embeds.sum().backward()
    assert case.prompts.grad is not None


def test_a_table_that_trains_gets_its_gradient(device: str) -> None:
    gradients = []
    for backend in ("triton", "reference"):
        case = gradient_case("left", torch.float32)
        case.embeddings, case.input_ids = torch.randn(9, 6, generator=torch.Generator().manual_seed(3)), (
            torch.arange(35).reshape(7, 5) % 9
        )  # fmt: skip
        case = case.to(device)
        case.embeddings.requires_grad_()
        prompt_concat(**vars(case), backend=backend).inputs_embeds.square().sum().backward()
        gradients.append(case.embeddings.grad)
    torch.testing.assert_close(*gradients)

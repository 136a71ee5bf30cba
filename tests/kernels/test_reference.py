"""`prompt_concat` in plain torch against a Python loop over rows and columns, float64 autograd and transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from softprompt_kernels import prompt_concat, reference
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from tests import tiny
from tests.kernels.oracle import Case, cases, gradient_case

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    """Equal to the bit, in dtype and in shape."""
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@settings(max_examples=2000, deadline=None)
@given(cases(FLOATING))
def test_against_the_loop(case: Case) -> None:
    check(prompt_concat(**vars(case)), case.expected())


@settings(max_examples=300, deadline=None)
@given(cases(FLOATING))
def test_the_form_that_sees_no_values(case: Case) -> None:
    # What runs on a GPU without Triton and under torch.compile.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        check(prompt_concat(**vars(case)), case.expected())


@settings(max_examples=300, deadline=None)
@given(cases(FLOATING))
def test_the_form_of_large_batches(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_SMALL", 0)
        check(prompt_concat(**vars(case)), case.expected())


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("is_compiling", [False, True])
@pytest.mark.parametrize("is_table", [False, True])
@pytest.mark.parametrize("task_ids", [None, [2] * 7, [0, 2, 0, 2, 2, 0, 2]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_against_float64_autograd(
    side: str, task_ids, is_table: bool, is_compiling: bool, is_large: bool, monkeypatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    if is_large:
        monkeypatch.setattr(reference, "_SMALL", 0)
    weight = torch.randn(7, 10 if task_ids is None else 9, 6, generator=torch.Generator().manual_seed(1))

    def run(dtype: torch.dtype, prompt_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        case = gradient_case(side, dtype)
        if is_table:
            case.input_ids = torch.arange(35).reshape(7, 5) % 6
            case.embeddings = torch.arange(36.0).reshape(6, 6).to(dtype)
        if task_ids is not None:
            # Prompts of one length and no leading pads: a plain concatenation.
            case.task_ids, case.attention_mask, case.max_prompt_length = torch.tensor(task_ids), None, 4
        case.prompts = case.prompts.to(prompt_dtype).requires_grad_()
        case.embeddings.requires_grad_()
        out = prompt_concat(**vars(case))
        (out.inputs_embeds * weight.to(dtype)).sum().backward()
        return case.prompts.grad, case.embeddings.grad

    for found, expected in zip(run(torch.float32, torch.float32), run(torch.float64, torch.float64), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-6
    # bfloat16 activations: the gradient is summed in float32, only the incoming one is rounded.
    low, expected = run(torch.bfloat16, torch.float32)[0], run(torch.float64, torch.float64)[0]
    assert low.dtype == torch.float32 and float((low - expected).norm() / expected.norm()) < 4e-3


@pytest.mark.parametrize("is_compiling", [False, True])
@pytest.mark.parametrize("lengths", [[2, 2], [2, 1]])
def test_gradients_of_low_precision_prompts_are_summed_in_float32(lengths, is_compiling: bool, monkeypatch) -> None:
    # 1023 ones: in bfloat16 a sum stops at 256.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    prompts = torch.zeros(sum(lengths), 4, dtype=torch.bfloat16, requires_grad=True)
    tasks = torch.tensor([0] * 1023 + [1])
    out = prompt_concat(
        torch.zeros(1024, 1, 4, dtype=torch.bfloat16), None, prompts, torch.tensor([0, *lengths]).cumsum(0), tasks,
        padding_side="left", max_prompt_length=2,
    )  # fmt: skip
    out.inputs_embeds.sum().backward()
    assert prompts.grad.dtype == torch.bfloat16
    assert prompts.grad[:, 0].tolist() == [1024.0, 1024.0] + [1.0] * lengths[1]  # 1023, rounded once


@pytest.mark.parametrize("form", ["boolean", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_causal_mask_is_that_of_transformers(side: str, form: str) -> None:
    case = gradient_case(side, torch.float32)
    case.mask_form, case.embeddings = form, torch.randn(7, 5, 6)
    out = prompt_concat(**vars(case))
    case.mask_form = "padding"
    padding = prompt_concat(**vars(case)).attention_mask
    config = tiny.tiny_model("llama").config
    config._attn_implementation = "sdpa" if form == "boolean" else "eager"
    theirs = create_causal_mask(config, out.inputs_embeds, padding, None, position_ids=out.position_ids)
    assert torch.equal(out.attention_mask, theirs)


def test_a_model_reads_the_causal_mask() -> None:
    torch.manual_seed(0)
    model = tiny.tiny_model("llama")
    table = model.get_input_embeddings().weight.detach()
    ids, mask = torch.randint(5, 40, (2, 4)), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    given = (table, ids, table[:3].clone(), torch.tensor([0, 1, 3]), torch.tensor([1, 0]), mask)
    logits = []
    for form in ("padding", "boolean"):
        out = prompt_concat(*given, padding_side="left", max_prompt_length=2, mask_form=form)
        result = model(
            inputs_embeds=out.inputs_embeds, attention_mask=out.attention_mask, position_ids=out.position_ids
        )
        logits.append(result.logits[:, -2:])
    torch.testing.assert_close(*logits)

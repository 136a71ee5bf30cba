"""The Triton kernels against a Python loop and plain torch; with every address watched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from softprompt_kernels import prompt_concat, triton_concat

from tests.kernels.memory import watched, watched_memory
from tests.kernels.oracle import Case, cases, gradient_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(found: tuple, expected: tuple, case: Case) -> None:
    for name, mine, theirs in zip(("embeds", "mask", "positions", "labels"), found, expected, strict=True):
        if theirs is None:
            assert mine is None
            continue
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
        casts = case.prompts.dtype == torch.float32 and case.embeddings.dtype == torch.bfloat16
        if name == "embeds" and casts and not mine.is_cuda:
            # The interpreter of Triton 3.9 truncates this cast; a GPU rounds to nearest even.
            assert bool(((mine.float() - theirs.float()).abs() <= theirs.float().abs() * 2**-7).all())
        else:
            assert torch.equal(mine.cpu(), theirs), name


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(DTYPES, batch=4, length=5), gradient=st.booleans())
def test_against_the_loop(device: str, case: Case, gradient: bool) -> None:
    case = case.to(device)
    case.prompts.requires_grad_(gradient)
    if case.input_ids is None:
        case.embeddings.requires_grad_(gradient)
    with watched(device):
        out = prompt_concat(**vars(case), backend="triton")
        if gradient:
            out.inputs_embeds.float().square().sum().backward()
    found = [case.prompts.grad, case.embeddings.grad]
    case = case.to("cpu")
    case.prompts, case.embeddings = case.prompts.detach(), case.embeddings.detach()
    check(out, case.expected(), case)
    if gradient:
        # Every value stands somewhere as often as its row uses it, so its gradient is twice the sum of its places.
        case.prompts.requires_grad_()
        case.embeddings.requires_grad_(case.input_ids is None)
        prompt_concat(**vars(case), backend="reference").inputs_embeds.float().square().sum().backward()
        for mine, theirs in zip(found, [case.prompts.grad, case.embeddings.grad], strict=True):
            if theirs is not None:
                torch.testing.assert_close(mine.cpu(), theirs, rtol=2**-6, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(DTYPES, batch=3, length=4), data=st.data())
def test_wrong_values_stay_inside_the_tensors(device: str, case: Case, data: st.DataObject) -> None:
    # On a GPU values are not looked at. Whatever they are, no access may leave a tensor.
    if not len(case.task_ids):
        return
    numbers = st.sampled_from([-(2**62), -9, -2, -1, 0, 1, 2, 3, 9, 2**31, 2**62])

    def hostile(like: torch.Tensor) -> torch.Tensor:
        return torch.tensor([data.draw(numbers) for _ in range(like.numel())], dtype=torch.int64).reshape(like.shape)

    case.task_ids, case.offsets = hostile(case.task_ids), hostile(case.offsets)
    case.input_ids = None if case.input_ids is None else hostile(case.input_ids)
    case.max_prompt_length = data.draw(st.integers(0, 4))
    given_tensors = [*vars(case.to(device)).values()][:7]
    with watched(device):
        out = torch.ops.softprompt_kernels.prompt_concat(
            *given_tensors, case.padding_side == "left", case.max_prompt_length, case.mask_form
        )
        gradient = torch.ones_like(out[0])
        offsets, task_ids = given_tensors[3:5]
        sums = torch.ops.softprompt_kernels.prompt_gradient(gradient, out[4], offsets, task_ids, len(case.prompts))
        torch.ops.softprompt_kernels.text_gradient(gradient, out[4], case.text_length)
    assert bool(torch.isfinite(sums).all())
    # Plain torch that does not look at values takes wrong ones the same way.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        expected = prompt_concat(**vars(case), backend="reference")
    check((*out[:3], None if case.labels is None else out[3]), expected, case)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_longer_than_said_is_cut_alike(device: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a look at values: the layout and the gradients of both backends.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    results = []
    for backend in ("triton", "reference"):
        case = gradient_case(side, torch.float32).to(device)
        case.max_prompt_length = 2
        case.prompts.requires_grad_()
        case.embeddings.requires_grad_()
        out = prompt_concat(**vars(case), backend=backend)
        weight = torch.arange(float(out.inputs_embeds.numel()), device=device).view_as(out.inputs_embeds)
        (out.inputs_embeds * weight).sum().backward()
        results.append((*out[:3], case.prompts.grad, case.embeddings.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_watch_sees_an_access_outside(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("the interpreter alone is watched")
    case = gradient_case("left", torch.float32)
    with watched_memory() as checked:
        prompt_concat(**vars(case), backend="triton")
    assert checked[0] > 0
    outputs = triton_concat.outputs

    def too_short(*arguments):
        out = outputs(*arguments)
        return out._replace(position_ids=out.position_ids[:-1])

    monkeypatch.setattr(triton_concat, "outputs", too_short)
    with watched_memory(), pytest.raises(Exception, match="addresses lies in none"):
        prompt_concat(**vars(case), backend="triton")


@pytest.mark.parametrize("side", ["left", "right"])
def test_blocks_of_the_size_that_gpus_get(device: str, side: str) -> None:
    for dtype in DTYPES:
        torch.manual_seed(0)
        case = Case(
            embeddings=torch.randn(50, 576).to(dtype), input_ids=torch.randint(0, 50, (3, 520)),
            prompts=torch.randn(70, 576).to(dtype), offsets=torch.tensor([0, 20, 70]),
            task_ids=torch.tensor([1, -1, 0]), attention_mask=(torch.arange(520) >= torch.tensor([[0], [515], [7]])),
            labels=torch.randint(0, 50, (3, 520)), padding_side=side, max_prompt_length=50, mask_form="padding",
        )  # fmt: skip
        with watched(device):
            found = prompt_concat(**vars(case.to(device)), backend="triton")
        check(found, prompt_concat(**vars(case), backend="reference"), case)


def test_memory_with_gaps_and_other_offsets(device: str) -> None:
    # A view that starts off 16 bytes, ids and masks with strides, ready embeddings with gaps.
    case = gradient_case("right", torch.float32)
    case.labels = torch.arange(35).reshape(7, 5)
    expected = prompt_concat(**vars(case), backend="reference")
    moved = case.to(device)
    moved.prompts = torch.cat([torch.zeros(7, device=device), moved.prompts.flatten()])[7:].view(9, 6)
    moved.embeddings = torch.stack([moved.embeddings] * 2, -1)[..., 0]
    moved.attention_mask = moved.attention_mask.T.contiguous().T
    moved.labels = torch.stack([moved.labels] * 2, -1)[..., 0]
    moved.task_ids = torch.stack([moved.task_ids] * 2, -1)[:, 0]
    assert not moved.embeddings.is_contiguous() and moved.prompts.is_contiguous()
    check(prompt_concat(**vars(moved), backend="triton"), expected, case)

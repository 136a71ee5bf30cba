"""`prompt_concat` against a Python loop over rows and columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from softprompt_kernels import prompt_concat


def loop(text, prompts, offsets, task_ids, mask, labels, side, longest):
    """The layout by its definition, one column at a time."""
    batch, length, hidden = text.shape
    width = longest + length
    embeds = torch.zeros(batch, width, hidden, dtype=text.dtype)
    out_mask = torch.zeros(batch, width, dtype=mask.dtype)
    positions = torch.zeros(batch, width, dtype=torch.int64)
    out_labels = torch.full((batch, width), -100)
    for b in range(batch):
        task = int(task_ids[b])
        rows = prompts[offsets[task] : offsets[task + 1]] if task >= 0 else prompts[:0]
        first = next((j for j in range(length) if mask[b, j]), length)
        start = longest + first - len(rows) if side == "left" else 0
        seen = 0
        for column in range(width):
            place = column - start
            if 0 <= place < len(rows):
                embeds[b, column] = rows[place].to(text.dtype)
                out_mask[b, column] = 1
            elif place >= len(rows) and first + place - len(rows) < length:
                source = first + place - len(rows)
                embeds[b, column] = text[b, source]
                out_mask[b, column] = mask[b, source]
                predicted = len(rows) > 0 or source > first
                if mask[b, source] and predicted:
                    out_labels[b, column] = labels[b, source]
            seen += bool(out_mask[b, column])
            positions[b, column] = max(seen - 1, 0)
    return embeds, out_mask, positions, out_labels


@st.composite
def cases(draw):
    batch, length, hidden = draw(st.integers(0, 5)), draw(st.integers(0, 6)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 5), max_size=4))
    task_ids = [draw(st.integers(-1, len(lengths) - 1)) for _ in range(batch)]
    longest = max((lengths[t] for t in task_ids if t >= 0), default=0) + draw(st.integers(0, 2))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    mask = torch.tensor([[draw(st.booleans()) for _ in range(length)] for _ in range(batch)]).reshape(batch, length)
    return dict(
        text=torch.randn(batch, length, hidden, generator=generator).to(dtype),
        prompts=torch.randn(sum(lengths), hidden, generator=generator),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        task_ids=torch.tensor(task_ids, dtype=torch.int64),
        mask=mask.to(draw(st.sampled_from([torch.int64, torch.bool, torch.int32]))),
        labels=torch.randint(0, 50, (batch, length), generator=generator),
        side=draw(st.sampled_from(["left", "right"])),
        longest=longest,
    )


@settings(max_examples=400, deadline=None)
@given(cases())
def test_against_the_loop(case) -> None:
    expected = loop(**case)
    found = prompt_concat(
        case["text"],
        None,
        case["prompts"],
        case["offsets"],
        case["task_ids"],
        case["mask"],
        case["labels"],
        padding_side=case["side"],
        max_prompt_length=case["longest"],
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_against_float64_autograd(side: str) -> None:
    torch.manual_seed(0)
    table = torch.randn(20, 6)
    prompts = torch.randn(9, 6, requires_grad=True)
    ids, tasks = torch.randint(0, 20, (7, 5)), torch.tensor([0, 1, -1, 2, 1, 1, 0])
    mask = torch.tensor([[0] * k + [1] * (5 - k) for k in (0, 1, 2, 0, 4, 5, 3)])
    weight = torch.randn(7, 9, 6)
    offsets = torch.tensor([0, 4, 5, 9])

    def run(table, prompts, weight):
        out = prompt_concat(table, ids, prompts, offsets, tasks, mask, padding_side=side, max_prompt_length=4)
        (out.inputs_embeds * weight).sum().backward()
        return prompts.grad

    found = run(table, prompts, weight)
    expected = run(table.double(), prompts.detach().double().requires_grad_(), weight.double())
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    # bfloat16 activations: the gradient is summed in float32, only the incoming one is rounded.
    low = run(table.bfloat16(), prompts.detach().requires_grad_(), weight.bfloat16())
    assert low.dtype == torch.float32 and float((low - expected).norm() / expected.norm()) < 4e-3


def arguments(**changes):
    base = dict(
        embeddings=torch.zeros(2, 3, 4),
        input_ids=None,
        prompts=torch.zeros(5, 4),
        offsets=torch.tensor([0, 2, 5]),
        task_ids=torch.tensor([0, 1]),
        padding_side="left",
        max_prompt_length=3,
    )
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        (dict(embeddings=[1]), TypeError, "embeddings"),
        (dict(embeddings=torch.zeros(2, 3, 4, dtype=torch.int64)), TypeError, "embeddings"),
        (dict(embeddings=torch.zeros(2, 4)), ValueError, "embeddings"),
        (dict(input_ids=torch.zeros(2, 3)), ValueError, "embeddings"),
        (dict(embeddings=torch.zeros(9, 4), input_ids=torch.zeros(2, 3)), TypeError, "input_ids"),
        (dict(embeddings=torch.zeros(9, 4), input_ids=torch.full((2, 3), 9)), ValueError, "input_ids"),
        (dict(prompts=torch.zeros(5, 3)), ValueError, "prompts"),
        (dict(prompts=torch.zeros(5, 4, dtype=torch.int64)), TypeError, "prompts"),
        (dict(offsets=torch.tensor([0, 3, 2])), ValueError, "offsets"),
        (dict(offsets=torch.tensor([0.0, 5.0])), TypeError, "offsets"),
        (dict(task_ids=torch.tensor([0, 2])), ValueError, "task_ids"),
        (dict(task_ids=torch.tensor([0, -2])), ValueError, "task_ids"),
        (dict(task_ids=torch.tensor([0])), ValueError, "task_ids"),
        (dict(task_ids=torch.tensor([0.0, 1.0])), TypeError, "task_ids"),
        (dict(attention_mask=torch.ones(2, 3)), TypeError, "attention_mask"),
        (dict(attention_mask=torch.ones(2, 4, dtype=torch.int64)), ValueError, "attention_mask"),
        (dict(labels=torch.ones(2, 3)), TypeError, "labels"),
        (dict(labels=torch.ones(3, 2, dtype=torch.int64)), ValueError, "labels"),
        (dict(labels=torch.ones(2, 3, dtype=torch.int64, device="meta")), ValueError, "labels"),
        (dict(padding_side="middle"), ValueError, "padding_side"),
        (dict(max_prompt_length=2), ValueError, "max_prompt_length"),
        (dict(max_prompt_length=-1), ValueError, "max_prompt_length"),
        (dict(max_prompt_length=2.0), TypeError, "max_prompt_length"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes, error, name: str) -> None:
    with pytest.raises(error, match=f"^{name} "):
        prompt_concat(**arguments(**changes))

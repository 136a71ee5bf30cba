"""What prompts train on, against softmaxes by hand over the labels, in float64, of the bare model on hard tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate, Tokens, attach
from lightning_softprompt.inference.ranking import RankedRow, classify_labels
from lightning_softprompt.training.objectives import (
    label_loss,
    row_losses,
    task_means,
    tasks_among_labels,
    token_losses,
)
from tests import tiny

# One token; several; some that share beginnings; one that is long where the others are short; one alone.
LABELS = {
    "tone": [[5], [6], [7]],
    "city": [[8, 9, 2], [8, 9, 10, 2], [8, 11], [12, 13, 14]],
    "same": [[15, 16]],
}
PROMPTS = {"tone": [40, 41, 42], "city": [43], "same": [44, 45]}
ROWS = [
    ("tone", [20, 21], 1),
    ("city", [22], 0),
    ("city", [23, 24, 25], 3),
    ("same", [26], 0),
    ("city", [27, 28], 2),
    ("tone", [29], 0),
    ("city", [30], 1),
]


def batch(side: str) -> dict[str, Tensor]:
    rows = [(text, LABELS[task][label]) for task, text, label in ROWS]
    width = max(len(text) + len(label) for text, label in rows)
    ids, mask, labels = [], [], []
    for text, label in rows:
        pads = width - len(text) - len(label)
        front, back = (pads, 0) if side == "left" else (0, pads)
        ids.append([0] * front + text + label + [0] * back)
        mask.append([0] * front + [1] * (len(text) + len(label)) + [0] * back)
        labels.append([-100] * (front + len(text)) + label + [-100] * back)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def by_hand(embeds: dict[str, Tensor], bare) -> list[Tensor]:
    """−log of the probability of each row's label, fork by fork over the listed labels, float64."""
    table = bare.get_input_embeddings().weight.detach()
    found = []
    for task, text, index in ROWS:
        label, total = LABELS[task][index], torch.zeros((), dtype=torch.float64)
        for place, token in enumerate(label):
            rivals = sorted({other[place] for other in LABELS[task] if other[:place] == label[:place]})
            row = torch.cat([embeds[task], table[torch.tensor(text + label[:place])]])
            logits = bare(inputs_embeds=row[None]).logits[0, -1]
            total = total - logits[rivals].log_softmax(0)[rivals.index(token)]
        found.append(total)
    return found


def attached(prefix="auto"):
    model = tiny.tiny_model()
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in PROMPTS.items()})
    return attach(model, prompts, prefix), prompts


@pytest.mark.parametrize("prefix", ["auto", "never"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradient_are_those_of_softmaxes_over_the_labels(side: str, prefix) -> None:
    model, prompts = attached(prefix)
    inputs, tasks = batch(side), [task for task, _, _ in ROWS]
    logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, tasks=tasks).logits
    losses = label_loss(logits, inputs["labels"], tasks, LABELS, reduction="none")
    mean = label_loss(logits, inputs["labels"], tasks, LABELS)
    mean.backward()
    bare = tiny.tiny_model().double()
    leaves = {task: prompts[task].detach().double().requires_grad_() for task in PROMPTS}
    expected = torch.stack(by_hand(leaves, bare))
    expected.mean().backward()
    assert tiny.relative_error(losses.detach().double(), expected.detach()) < 1e-5
    assert mean.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    for task in ("tone", "city"):
        assert tiny.relative_error(prompts[task].grad.double(), leaves[task].grad) < 1e-5
    assert losses[3] == 0 and not prompts["same"].grad.any()  # one label: nothing to tell apart


def test_it_is_the_logarithm_of_what_classify_answers() -> None:
    model, _ = attached()
    inputs, tasks = batch("left"), [task for task, _, _ in ROWS]
    with torch.no_grad():
        logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, tasks=tasks).logits
    losses = label_loss(logits, inputs["labels"], tasks, LABELS, reduction="none")
    found = classify_labels(model, [RankedRow(text, task, LABELS[task]) for task, text, _ in ROWS], 0)
    for loss, probabilities, (_, _, index) in zip(losses.tolist(), found, ROWS, strict=True):
        assert math.exp(-loss) == pytest.approx(probabilities[index], rel=1e-5)


def test_other_tokens_than_the_labels_get_no_gradient() -> None:
    logits = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[-100, 8, 11], [-100, -100, 5]])
    label_loss(logits, labels, ["city", "tone"], LABELS).backward()
    touched = {
        (row, column): logits.grad[row, column].nonzero()[:, 0].tolist() for row in (0, 1) for column in (0, 1, 2)
    }
    assert touched == {(0, 0): [8, 12], (0, 1): [9, 11], (0, 2): [], (1, 0): [], (1, 1): [5, 6, 7], (1, 2): []}


def test_rows_of_free_text_beside_rows_of_labels() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 20, generator=draw)
    labels = torch.tensor([[-100, -100, 5, -100], [-100, 17, 18, 19], [-100, -100, -100, 6]])
    tasks = ["tone", "free", "tone"]
    losses, counts = row_losses(logits, labels, tasks, {"tone": LABELS["tone"]})
    alone = [label_loss(logits[[row]], labels[[row]], ["tone"], LABELS) for row in (0, 2)]
    tokens = functional.cross_entropy(logits[1, :3].double(), labels[1, 1:], reduction="sum")
    assert counts.tolist() == [1, 3, 1]
    assert losses.tolist() == pytest.approx([float(alone[0]), float(tokens), float(alone[1])], rel=1e-6)
    kept = label_loss(logits, labels, ["tone", None, "tone"], LABELS)
    assert float(kept) == pytest.approx(float(alone[0] + alone[1]) / 2, rel=1e-6)
    assert float(label_loss(logits, labels, [None] * 3, {})) == 0
    summed, count = token_losses(logits, labels)
    assert count.tolist() == [1, 3, 1] and float(summed[1]) == pytest.approx(float(tokens), rel=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[-100, 6]])
    found = label_loss(logits, labels, ["tone"], LABELS)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(-float(logits[0, 0, [5, 6, 7]].double().log_softmax(0)[1]), rel=1e-6)


@pytest.mark.parametrize(
    "target, task, said",
    [
        (
            [-100, 17],
            "tone",
            r"row 0, of task 'tone', has the target \[17\], and the labels are \[\[5\], \[6\], \[7\]\]",
        ),
        ([-100, -100], "tone", r"row 0, of task 'tone', has the target \[\]"),
        ([-100, 8], "city", r"has the target \[8\]"),
        ([-100, 5], "free", "row 0, of task 'free', has no labels"),
        ([5, -100], "tone", "begins in the first column, which nothing predicts"),
    ],
)
def test_a_row_that_has_no_such_label_is_refused(target: list[int], task: str, said: str) -> None:
    with pytest.raises(SoftPromptError, match=said):
        label_loss(torch.zeros(1, 2, 20), torch.tensor([target]), [task], LABELS)


def test_which_tasks_train_among_their_labels() -> None:
    templates = {"tone": TaskTemplate("{a}", "{b}", labels=["x", "y"]), "free": TaskTemplate("{a}", "{b}")}
    assert tasks_among_labels("labels", templates) == {"tone"}
    assert tasks_among_labels("tokens", templates) == tasks_among_labels("auto", templates) == frozenset()
    with pytest.raises(SoftPromptError, match="no task has any; give their templates labels"):
        tasks_among_labels("labels", {"free": templates["free"]})
    with pytest.raises(SoftPromptError, match="objective must be one of"):
        tasks_among_labels("label", templates)  # type: ignore[arg-type]


def test_a_tasks_mean_is_over_its_own_targets_and_keeps_what_is_not_finite() -> None:
    losses, counts = torch.tensor([1.0, float("nan"), 4.0, 3.0]), torch.tensor([1, 2, 3, 1])
    found = task_means(losses, counts, ["b", "a", "b", "c"])
    assert list(found) == ["b", "a", "c"]
    assert float(found["b"]) == 5 / 4 and float(found["c"]) == 3 and found["a"].isnan()

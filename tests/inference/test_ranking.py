"""Label ranking against one bare forward pass a label."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPrompts, Tokens, attach
from lightning_softprompt.inference.ranking import RankedRow, rank_labels
from tests import tiny

LABELS = [[[5], [6]], [[7, 8, 9], [7, 8], [7], [10, 11]], [[12, 13], [12, 14], [15]]]


@pytest.mark.parametrize("attached", [False, True])
def test_scores_are_those_of_each_label_alone(attached: bool) -> None:
    bare, model = tiny.tiny_model("llama"), tiny.tiny_model("llama")
    texts = [[20, 21, 22], [30], [40, 41]]
    if attached:
        attach(model, SoftPrompts.for_model(model, {name: Tokens(ids) for name, ids in tiny.HARD.items()}))
    tasks = [*tiny.TASKS[:2], None] if attached else [None] * 3
    rows = [RankedRow(text, task, labels) for text, task, labels in zip(texts, tasks, LABELS, strict=True)]
    found = rank_labels(model, rows, pad_token_id=1)
    for row, scores in zip(rows, found, strict=True):
        prompt = tiny.HARD[row.task] if row.task else []
        for label, score in zip(row.labels, scores, strict=True):
            ids = [*prompt, *row.text_ids, *label]
            with torch.no_grad():
                log_probabilities = bare(torch.tensor([ids])).logits[0].log_softmax(-1)
            begin = len(ids) - len(label)
            expected = sum(float(log_probabilities[begin + k - 1, token]) for k, token in enumerate(label))
            assert score == pytest.approx(expected, rel=1e-4)


def test_labels_of_one_token_share_one_row() -> None:
    model, widths = tiny.tiny_model("llama"), []
    model.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape), with_kwargs=True)
    rank_labels(model, [RankedRow([20, 21], None, [[5], [6], [7]]), RankedRow([9], None, [[5], [6]])], 1)
    assert widths == [(2, 2)]

"""Classification by ranking: how likely the model finds each of a task's labels behind a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.base.padding import padded_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RankedRow:
    """A text, its task, and the labels to rank behind the text; text and labels are token ids."""

    text_ids: list[int]
    task: Any
    labels: Sequence[Sequence[int]]


def rank_labels(
    model: PreTrainedModel, rows: Sequence[RankedRow], pad_token_id: int, **options: Any
) -> list[list[float]]:
    """The log-probability of each label behind each row's text, summed over the label's tokens.

    The model predicts the last token of a label but never reads it. So labels of one token share one row, and longer
    labels take rows of their own only if they differ before their last token.

    Args:
        model: a causal LM. If prompts are attached to it, each row gets the prompt of its task.
        rows: the texts, with their tasks and labels.
        pad_token_id: the id of pads. As pads are masked, any id that the model knows will do.
        options: passed to the model.

    Returns:
        For each row a list of log-probabilities, in the order of its labels.
    """
    passed = [(index, stem) for index, row in enumerate(rows) for stem in stems(row.labels)]
    texts = [rows[index].text_ids + list(stem) for index, stem in passed]
    inputs = padded_inputs(texts, pad_token_id, model.device)
    longest = max(len(stem) for _, stem in passed) + 1
    routing = {"tasks": [rows[index].task for index, _ in passed]} if attachment_of(model) else {}
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=longest, **routing, **options).logits
    log_probabilities = logits[:, -longest:].float().log_softmax(-1)
    cells = torch.tensor(_cells(rows, passed, longest), device=log_probabilities.device)
    found = iter(log_probabilities[tuple(cells.T)].tolist())
    return [[sum(islice(found, len(label))) for label in row.labels] for row in rows]


def _cells(
    rows: Sequence[RankedRow], passed: Sequence[tuple[int, tuple[int, ...]]], longest: int
) -> list[tuple[int, int, int]]:
    """Where the score of each token of each label is found, row by row.

    An entry holds the row of the forward pass, the column of the logits, and the token's id.
    """
    numbers = {place: number for number, place in enumerate(passed)}
    cells = []
    for index, row in enumerate(rows):
        mine = stems(row.labels)
        for label in row.labels:
            stem = next(stem for stem in mine if stem[: len(label) - 1] == tuple(label[:-1]))
            first = longest - 1 - len(stem)
            cells += [(numbers[index, stem], first + place, token) for place, token in enumerate(label)]
    return cells


def stems(labels: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The token sequences that need a row of their own behind the text.

    They are the labels without their last tokens, each sequence once, except those with which another one begins.
    """
    found = {tuple(label[:-1]) for label in labels}
    return sorted(stem for stem in found if not any(o != stem and o[: len(stem)] == stem for o in found))

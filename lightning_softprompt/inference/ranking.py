"""Classification by ranking: which of a task's labels the model finds likeliest behind a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.base.padding import padded_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RankedRow:
    """A text and the labels to rank behind it, all as token ids."""

    text_ids: list[int]
    task: Any
    labels: Sequence[Sequence[int]]


def rank_labels(
    model: PreTrainedModel, rows: Sequence[RankedRow], pad_token_id: int, **options: Any
) -> list[list[float]]:
    """Log-probability of each label behind each row's text, summed over the label's tokens.

    A label's last token is predicted, never read; so labels of one token share one row, and only longer ones that
    differ before their last token take rows of their own.

    Args:
        model: a causal LM; rows are routed by `tasks` where prompts are attached to it.
        rows: the texts.
        pad_token_id: any id; pads are masked.
        options: given to the model as they are.

    Returns:
        One list of scores a row, in the order of its labels.
    """
    stems = [(index, stem) for index, row in enumerate(rows) for stem in _stems(row.labels)]
    texts = [rows[index].text_ids + list(stem) for index, stem in stems]
    inputs = padded_inputs(texts, pad_token_id, model.device)
    longest = max(len(stem) for _, stem in stems) + 1
    routing = {"tasks": [rows[index].task for index, _ in stems]} if attachment_of(model) else {}
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=longest, **routing, **options).logits
    log_probabilities = logits[:, -longest:].float().log_softmax(-1).cpu()
    scores: list[list[float]] = [[] for _ in rows]
    for index, row in enumerate(rows):
        mine = [(number, stem) for number, (owner, stem) in enumerate(stems) if owner == index]
        for label in row.labels:
            number, stem = next((p, s) for p, s in mine if s[: len(label) - 1] == tuple(label[:-1]))
            scores[index].append(_score(log_probabilities[number], label, longest - 1 - len(stem)))
    return scores


def _score(log_probabilities: Tensor, label: Sequence[int], first: int) -> float:
    return float(sum(log_probabilities[first + offset, token] for offset, token in enumerate(label)))


def _stems(labels: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The labels without their last tokens, less those that begin another one."""
    stems = {tuple(label[:-1]) for label in labels}
    return sorted(stem for stem in stems if not any(o != stem and o[: len(stem)] == stem for o in stems))

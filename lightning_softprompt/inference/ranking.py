"""Classification: how likely the model finds each of a task's labels behind a text."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
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


def rank_labels(model: PreTrainedModel, rows: Sequence[RankedRow], pad_token_id: int) -> list[list[float]]:
    """The log-probability of each label behind each row's text, over the vocabulary and summed over the label's tokens.

    Args:
        model: a causal LM. If prompts are attached to it, each row gets the prompt of its task.
        rows: the texts, with their tasks and labels.
        pad_token_id: the id of pads. As pads are masked, any id that the model knows will do.

    Returns:
        For each row a list of log-probabilities, in the order of its labels.
    """
    return [[sum(label) for label in row] for row in score_tokens(model, rows, pad_token_id)]


def classify_labels(model: PreTrainedModel, rows: Sequence[RankedRow], pad_token_id: int) -> list[list[float]]:
    """The probability of each label behind each row's text, among the labels of the row: they sum to 1.

    The forward passes are those of `rank_labels`, and so are the arguments. No label of a row may begin another one.

    Returns:
        For each row a list of probabilities, in the order of its labels.
    """
    scores = score_tokens(model, rows, pad_token_id)
    return [among_labels(row.labels, of_row) for row, of_row in zip(rows, scores, strict=True)]


def among_labels(labels: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> list[float]:
    """The probabilities of labels over the trie of their ids.

    A label is a path through the trie. At each of its tokens the probability is that of the token among those with
    which a label can go on there, so that what the model would write in place of a label takes nothing from any label.

    Args:
        labels: the token ids of each label; none of them begins another one.
        scores: the log-probability of each token of each label.

    Returns:
        The probability of each label; together they are 1.

    Example:
        >>> among_labels([[5], [6, 7], [6, 8]], [[-2.0], [-2.0, -5.0], [-2.0, -5.0]])
        [0.5, 0.25, 0.25]
    """
    nodes: dict[tuple[int, ...], dict[int, float]] = {}
    for label, of_label in zip(labels, scores, strict=True):
        for place, (token, score) in enumerate(zip(label, of_label, strict=True)):
            nodes.setdefault(tuple(label[:place]), {}).setdefault(token, score)
    shares = {node: _normalised(children) for node, children in nodes.items()}
    return [math.prod(shares[tuple(label[:place])][token] for place, token in enumerate(label)) for label in labels]


def next_tokens(labels: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """The trie of labels: with which tokens they go on behind each beginning of theirs, in the order of the labels.

    Example:
        >>> next_tokens([[5], [6, 7], [6, 8]])
        {(): [5, 6], (6,): [7, 8]}
    """
    nodes: dict[tuple[int, ...], list[int]] = {}
    for label in labels:
        for place, token in enumerate(label):
            found = nodes.setdefault(tuple(label[:place]), [])
            if token not in found:
                found.append(token)
    return nodes


def _normalised(scores: dict[int, float]) -> dict[int, float]:
    """Probabilities from log-probabilities up to a constant."""
    most = max(scores.values())
    parts = {token: math.exp(score - most) for token, score in scores.items()}
    total = math.fsum(parts.values())
    return {token: part / total for token, part in parts.items()}


def score_tokens(model: PreTrainedModel, rows: Sequence[RankedRow], pad_token_id: int) -> list[list[list[float]]]:
    """The log-probability, over the vocabulary, of each token of each label behind each row's text.

    The model predicts the last token of a label but never reads it. So labels of one token share one row, and longer
    labels take rows of their own only if they differ before their last token. The arguments are those of `rank_labels`.

    Returns:
        For each row, for each of its labels, a list of the log-probabilities of its tokens.
    """
    passed = [(index, stem) for index, row in enumerate(rows) for stem in stems(row.labels)]
    texts = [rows[index].text_ids + list(stem) for index, stem in passed]
    inputs = padded_inputs(texts, pad_token_id, model.device)
    longest = max(len(stem) for _, stem in passed) + 1
    routing = {"tasks": [rows[index].task for index, _ in passed]} if attachment_of(model) else {}
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=longest, **routing).logits
    log_probabilities = logits[:, -longest:].float().log_softmax(-1)
    cells = torch.tensor(_cells(rows, passed, longest), device=log_probabilities.device)
    found = iter(log_probabilities[tuple(cells.T)].tolist())
    return [[list(islice(found, len(label))) for label in row.labels] for row in rows]


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
            stem = mine[bisect_left(mine, tuple(label[:-1]))]  # the first that begins with the label's own
            first = longest - 1 - len(stem)
            cells += [(numbers[index, stem], first + place, token) for place, token in enumerate(label)]
    return cells


def stems(labels: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The token sequences that need a row of their own behind the text.

    They are the labels without their last tokens, each sequence once, except those with which another one begins.
    """
    found = sorted({tuple(label[:-1]) for label in labels})
    # In this order a sequence stands in front of those that begin with it.
    return [stem for stem, after in pairwise(found) if after[: len(stem)] != stem] + found[-1:]

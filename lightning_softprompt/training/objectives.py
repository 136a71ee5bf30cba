"""What prompts train on: the loss of the target's tokens over the vocabulary, or that of the label among the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lightning_softprompt.errors import SoftPromptError, check_choice
from lightning_softprompt.inference.ranking import next_tokens
from lightning_softprompt.prompts.templates import TaskTemplate
from lightning_softprompt.transfer import to_device

Objective = Literal["auto", "labels", "tokens"]
Labels = Sequence[Sequence[int]]


def tasks_among_labels(objective: Objective, templates: Mapping[str, TaskTemplate]) -> frozenset[str]:
    """The tasks that train among their labels; the others train on the tokens of their targets.

    Args:
        objective: "labels": those that have labels. "tokens": none. "auto": none, too, as no other objective was better
            over five seeds (docs/learning.md).
        templates: of the tasks.

    Raises:
        SoftPromptError: another objective, or "labels" where no task has any.
    """
    check_choice("objective", objective, Objective)
    if objective != "labels":
        return frozenset()
    found = frozenset(task for task, template in templates.items() if template.labels is not None)
    if not found:
        raise SoftPromptError(
            "objective='labels' trains tasks among their labels, and no task has any; give their templates labels, or "
            "set objective='tokens'"
        )
    return found


def row_losses(
    logits: Tensor, labels: Tensor, tasks: Sequence[str], label_ids: Mapping[str, Labels]
) -> tuple[Tensor, Tensor]:
    """The loss of each row: among its labels for the tasks in `label_ids`, of its tokens for the others.

    The arguments are those of `label_loss`.

    Returns:
        The losses, in nats, float32 `[batch]`, and over how many targets each is summed, int64 `[batch]`: the tokens of
        its target, or one label.
    """
    among = [task if task in label_ids else None for task in tasks]
    if not any(among):
        return token_losses(logits, labels)
    (counts,) = to_device(labels.device, [task is not None for task in among])
    losses = label_loss(logits, labels, among, label_ids, reduction="none")
    if None in among:
        of_tokens, tokens = token_losses(logits, labels.masked_fill(counts[:, None] == 1, -100))
        losses, counts = losses + of_tokens, counts + tokens
    return losses, counts


def task_means(losses: Tensor, counts: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The mean loss over the targets of each task's rows, a scalar each.

    Args:
        losses: of the rows, `[batch]`, as `row_losses` gives them.
        counts: likewise.
        tasks: of the rows.
    """
    names = list(dict.fromkeys(tasks))
    (numbers,) = to_device(losses.device, [names.index(task) for task in tasks])
    of_task = numbers == torch.arange(len(names), device=losses.device)[:, None]
    # A loss that is not finite stays in its own task's mean, as it would not if it were multiplied by zero.
    summed, targets = (torch.where(of_task, values, 0).sum(1) for values in (losses, counts))
    return dict(zip(names, (summed / targets).unbind(), strict=True))


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row's target tokens over the vocabulary, summed over the row.

    Args:
        logits: `[batch, length, vocabulary]`, floating point.
        labels: int64 `[batch, length]`, as Hugging Face's models take them: the id that stands in a column, which the
            column before predicts, and −100 where nothing is scored.

    Returns:
        The losses, in nats, float32 `[batch]`, and how many tokens each row's target has, int64 `[batch]`.
    """
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=-100, reduction="none"
    )
    return losses.sum(1), (targets != -100).sum(1)


def label_loss(
    logits: Tensor,
    labels: Tensor,
    tasks: Sequence[str | None],
    label_ids: Mapping[str, Labels],
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The cross-entropy of each row's label among the labels of its task.

    At each token of the label, the probability is that of the token among those with which a label of the task can go
    on there, and not among the vocabulary. So a row's loss is −log of the probability that `classify` gives its label.
    What the model would write in place of any label costs nothing, and gets no gradient.

    Args:
        logits: `[batch, length, vocabulary]`, floating point.
        labels: int64 `[batch, length]`, as Hugging Face's models take them: the label's ids in their columns, −100 in
            all others. The column before predicts each.
        tasks: the task of each row; None for a row that does not count, as one of free text.
        label_ids: the token ids of each label of each task, as `TaskDataModule.label_ids(task)` gives them; none of
            them begins another one of its task.
        reduction: "mean" over the rows that count, or "none".

    Returns:
        The loss in nats, float32: a scalar, or `[batch]`, with 0 for rows that do not count.

    Raises:
        SoftPromptError: a row whose task has no labels, or whose target is none of them.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0, 3.0, 9.0], [0.0, 0.0, 0.0, 0.0]]])
        >>> labels = torch.tensor([[-100, 2]])
        >>> label_loss(logits, labels, ["tone"], {"tone": [[1], [2]]})  # log(1 + exp(1 − 3))
        tensor(0.1269)
    """
    check_choice("reduction", reduction, Literal["mean", "none"])
    forks = _Forks()
    for row, (task, target) in enumerate(zip(tasks, labels.tolist(), strict=True)):
        if task is not None:
            columns = [column for column, token in enumerate(target) if token != -100]
            forks.add(row, columns, [target[column] for column in columns], task, label_ids.get(task))
    losses = forks.losses(logits)
    count = sum(task is not None for task in tasks)
    return losses.sum() / max(count, 1) if reduction == "mean" else losses


class _Forks:
    """The places of a batch at which labels of a row's task part."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._places: list[int] = []  # of a row's forks, from 0
        self._columns: list[int] = []  # those that predict
        self._tokens: list[list[int]] = []  # with which labels go on, that of the row's label first
        self._known: dict[str, dict[tuple[int, ...], list[int]]] = {}

    def add(self, row: int, columns: list[int], target: list[int], task: str, labels: Labels | None) -> None:
        if not labels or target not in [[*label] for label in labels]:
            found = f"has the target {target}" if labels else "has no labels"
            known = f", and the labels are {[[*label] for label in labels]}" if labels else ""
            raise SoftPromptError(f"row {row}, of task {task!r}, {found}{known}; give token ids of one of its labels")
        if columns[0] == 0:
            raise SoftPromptError(f"row {row}: the label begins in the first column, which nothing predicts")
        if task not in self._known:
            self._known[task] = next_tokens(labels)
        count = 0
        for place, (column, token) in enumerate(zip(columns, target, strict=True)):
            others = [other for other in self._known[task][tuple(target[:place])] if other != token]
            if others:
                self._rows.append(row)
                self._places.append(count)
                count += 1
                self._columns.append(column - 1)
                self._tokens.append([token, *others])

    def losses(self, logits: Tensor) -> Tensor:
        """The loss of each row, float32 `[batch]`."""
        if not self._rows:  # no row counts, or each task has one label
            return logits.new_zeros(len(logits), dtype=torch.float32) + 0 * logits[:, 0, 0].float()
        widest = max(map(len, self._tokens))
        device = logits.device
        tokens = [token for each in self._tokens for token in each + [-1] * (widest - len(each))]
        rows, columns, places, flat = to_device(device, self._rows, self._columns, self._places, tokens)
        of_forks = flat.view(-1, widest)
        scores = logits[rows[:, None], columns[:, None], of_forks.clamp(min=0)].float()
        losses = -scores.masked_fill(of_forks < 0, -torch.inf).log_softmax(1)[:, 0]
        # Those of a row stand beside one another and are summed in their order, so that two runs are equal.
        of_rows = losses.new_zeros(len(logits), max(self._places) + 1)
        return of_rows.index_put((rows, places), losses).sum(1)

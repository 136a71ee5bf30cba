"""`PerTask`: any torchmetrics metric over interleaved rows, one copy a task."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.plot import plot_single_or_multi_val

from lightning_softprompt import ranks
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.task_names import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PerTask(nn.Module):
    """One copy of a metric for each task; a row updates the copy of its own task alone.

    torchmetrics' `MultitaskWrapper` wants every task in every update. Where there are several ranks, values are of the
    rows of all, also of a task that had none on this rank; every rank has to compute. Metrics that keep lists of rows
    (`BinaryAUROC` without thresholds, `ROUGEScore`) are gathered by torchmetrics 1.9 where every rank had rows of the
    task alone: give them thresholds, or evaluate on one rank.

    Args:
        metric: any torchmetrics metric whose arguments have one entry a row, tensors or lists.
        tasks: the tasks to report; None: every task that has rows.

    Attributes:
        metric: the one given: over the rows of all tasks.

    Example:
        >>> import torch
        >>> from torchmetrics.aggregation import MeanMetric
        >>> accuracy = PerTask(MeanMetric(), ["spam", "topic"])
        >>> accuracy.update(["spam", "topic", "spam"], torch.tensor([1.0, 1.0, 0.0]))
        >>> accuracy.compute()
        {'spam': tensor(0.5000), 'topic': tensor(1.)}
        >>> accuracy.scalars("accuracy")["accuracy"], accuracy.scalars("accuracy")["accuracy_micro"]
        (tensor(0.7500), tensor(0.6667))
    """

    def __init__(self, metric: Metric, tasks: Sequence[str] | None = None) -> None:
        super().__init__()
        self._grows = tasks is None
        self.tasks: tuple[str, ...] = ()
        self.metric = metric
        for task in tasks or ():
            self._add(task)

    def __getitem__(self, task: str) -> Metric:
        if task not in self.tasks:
            raise SoftPromptError(f"unknown task {task!r}; this metric has: {', '.join(map(repr, self.tasks))}")
        return self._modules[_name(task)]  # type: ignore[return-value]

    def update(self, tasks: Sequence[str | None], *values: Any, **named: Any) -> None:
        """Update with rows: their tasks (None rows count nowhere), and the metric's arguments, an entry a row each.

        Raises:
            SoftPromptError: an argument with another number of entries, or an unknown task; nothing is updated.
        """
        for value in (*values, *named.values()):
            if len(value) != len(tasks):
                raise SoftPromptError(
                    f"{len(tasks)} rows have tasks, an argument has {len(value)} entries; give one entry a row"
                )
        rows: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            if task is not None:
                rows.setdefault(task, []).append(index)
        for task in rows:
            self._find(task)
        copies = [(self._find(task), places) for task, places in rows.items()]
        if rows:
            copies.append((self.metric, sorted(index for places in rows.values() for index in places)))
        for copy, places in copies:
            copy.update(
                *(_of_rows(value, places) for value in values),
                **{name: _of_rows(value, places) for name, value in named.items()},
            )

    def compute(self) -> dict[str, Any]:
        """The value of each task that had rows, on any rank."""
        had_rows = [task for task in self.tasks if self[task].update_called]
        everywhere = dict.fromkeys(task for tasks in ranks.gathered(had_rows) for task in tasks)
        named = [task for task in self.tasks if task in everywhere] if not self._grows else list(everywhere)
        return {task: _value(self._find(task)) for task in named}

    def scalars(self, name: str) -> dict[str, Tensor]:
        """What to log of a metric whose value is a number: `log_dict(metric.scalars("val/accuracy"))`.

        Returns:
            `<name>/<task>` of each task that had rows; `<name>`, their mean (macro: every task counts the same); and
            `<name>_micro`, the metric over the rows of all tasks (every row counts the same). Empty without rows.

        Raises:
            SoftPromptError: a value that is no number.
        """
        values = self.compute()
        for task, value in values.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise SoftPromptError(
                    f"{type(self.metric).__name__} of task {task!r} is no single number; log what you need of compute()"
                )
        if not values:
            return {}
        macro = torch.stack([value.float() for value in values.values()]).mean()
        by_task = {f"{name}/{task}": value for task, value in values.items()}
        return {**by_task, name: macro, f"{name}_micro": _value(self.metric)}

    def plot(self) -> Figure:
        """A figure of the value of each task that had rows."""
        values = self.compute()
        if not values:
            raise SoftPromptError("there is nothing to plot: no task had rows yet; call update first")
        figure, _ = plot_single_or_multi_val(values, name=type(self.metric).__name__)
        return figure

    def reset(self) -> None:
        """Start anew."""
        self.metric.reset()
        for task in self.tasks:
            self[task].reset()

    def _find(self, task: str) -> Metric:
        if self._grows and task not in self.tasks:
            self._add(task)
        return self[task]

    def _add(self, task: str) -> None:
        copy = self.metric.clone()
        copy.reset()
        self.tasks = (*self.tasks, task)
        self.add_module(_name(task), copy)


def _name(task: str) -> str:
    return f"task:{escape(task)}"


def _of_rows(value: Any, rows: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[torch.tensor(rows, device=value.device)]
    return [value[row] for row in rows]


def _value(metric: Metric) -> Any:
    with warnings.catch_warnings():
        # A task may have had its rows on other ranks.
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method", category=UserWarning)
        metric._computed = None  # kept by each rank for itself: one that had no rows since would not meet the others
        return metric.compute()

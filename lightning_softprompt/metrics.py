"""`PerTask`: any torchmetrics metric over interleaved rows, one copy a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.task_names import escape


class PerTask(nn.Module):
    """One copy of a metric for each task; a row updates the copy of its own task alone.

    Args:
        metric: any torchmetrics metric whose arguments have one entry a row.
        tasks: the tasks to report; None: every task that has rows.

    Example:
        >>> import torch
        >>> from torchmetrics.aggregation import MeanMetric
        >>> accuracy = PerTask(MeanMetric(), ["spam", "topic"])
        >>> accuracy.update(["spam", "topic", "spam"], torch.tensor([1.0, 1.0, 0.0]))
        >>> accuracy.compute()
        {'spam': tensor(0.5000), 'topic': tensor(1.)}
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

    def update(self, tasks: Sequence[str | None], *values: Tensor) -> None:
        """Update with rows: their tasks (None rows count nowhere), and the metric's arguments, `[batch, …]` each."""
        for task in dict.fromkeys(task for task in tasks if task is not None):
            if self._grows and task not in self.tasks:
                self._add(task)
            rows = torch.tensor([index for index, other in enumerate(tasks) if other == task])
            self[task].update(*(value[rows.to(value.device)] for value in values))

    def compute(self) -> dict[str, Any]:
        """The value of each task that had rows."""
        return {task: self[task].compute() for task in self.tasks if self[task].update_called}

    def reset(self) -> None:
        """Start anew."""
        for task in self.tasks:
            self[task].reset()

    def _add(self, task: str) -> None:
        self.tasks = (*self.tasks, task)
        self.add_module(_name(task), self.metric.clone())


def _name(task: str) -> str:
    return f"task:{escape(task)}"

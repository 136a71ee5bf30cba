"""`PerTask`: a torchmetrics metric for each task, over rows of mixed tasks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.plot import plot_single_or_multi_val

from lightning_softprompt.distributed import gathered, has_several_ranks
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.figures import style
from lightning_softprompt.prompts.task_names import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PerTask(nn.Module):
    """A copy of a metric for each task. A row updates the copy of its own task and the metric over all tasks.

    Unlike the `MultitaskWrapper` of torchmetrics, an update need not contain every task. If there are several ranks,
    values are computed from the rows of all of them, also for a task without rows on this rank. So every rank must call
    `compute`, `scalars` or `plot`.

    Args:
        metric: any torchmetrics metric whose arguments, tensors or lists, have one entry per row.
        tasks: the tasks to report; None means every task that has rows.

    Attributes:
        metric: the given metric, which is updated with the rows of all tasks.

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
        """Update with rows.

        Args:
            tasks: the task of each row; a row of task None is not counted.
            values: the metric's positional arguments, each with one entry per row.
            named: the metric's keyword arguments, each with one entry per row.

        Raises:
            SoftPromptError: an argument with another number of entries, or an unknown task; nothing is updated then.
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
        copies = [(self._find(task), indices) for task, indices in rows.items()]
        if rows:
            copies.append((self.metric, sorted(index for indices in rows.values() for index in indices)))
        for copy, indices in copies:
            copy.update(
                *(_of_rows(value, indices) for value in values),
                **{name: _of_rows(value, indices) for name, value in named.items()},
            )

    def compute(self) -> dict[str, Any]:
        """The value of each task that had rows on any rank."""
        had_rows = [task for task in self.tasks if self[task].update_called]
        everywhere = dict.fromkeys(task for tasks in gathered(had_rows) for task in tasks)
        named = [task for task in self.tasks if task in everywhere] if not self._grows else list(everywhere)
        return dict(zip(named, _values([self._find(task) for task in named]), strict=True))

    def scalars(self, name: str) -> dict[str, Tensor]:
        """The values to log for a metric whose value is one number: `log_dict(metric.scalars("val/accuracy"))`.

        Returns:
            `<name>/<task>` for each task that had rows; `<name>`, their mean (macro: every task counts the same); and
            `<name>_micro`, the metric over the rows of all tasks (every row counts the same). Without rows, an empty
            dict.

        Raises:
            SoftPromptError: a value that is not one number.
        """
        values = self.compute()
        for task, value in values.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise SoftPromptError(
                    f"{type(self.metric).__name__} of task {task!r} is no single number; log what you need of compute()"
                )
        if not values:
            return {}
        # Summed in the order of the tasks' names, because the rounding of a sum depends on its order.
        macro = torch.stack([values[task].float() for task in sorted(values)]).mean()
        by_task = {f"{name}/{task}": value for task, value in values.items()}
        return {**by_task, name: macro, f"{name}_micro": _values([self.metric])[0]}

    def plot(self) -> Figure:
        """Draw a figure with the value of each task that had rows.

        Raises:
            SoftPromptError: no task had rows yet.
        """
        values = self.compute()
        if not values:
            raise SoftPromptError("there is nothing to plot: no task had rows yet; call update first")
        with style():
            figure, _ = plot_single_or_multi_val(values, name=type(self.metric).__name__)
        return figure

    def reset(self) -> None:
        """Forget all rows."""
        # What is made in inference mode, as in `Trainer.validate`, no validation of a later fit could update.
        with torch.inference_mode(False):
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


def _values(metrics: Sequence[Metric]) -> list[Any]:
    """The values of `metrics` over the rows of all ranks. Every rank calls this with its own copies of the metrics.

    torchmetrics 1.9 gathers the states of a metric one by one, but leaves out a state that is an empty list, or assumes
    another dtype for it. A rank without rows of a task would then let the other ranks wait forever. Therefore all
    states are gathered at once and combined here.
    """
    if has_several_ranks():
        copies = [metric.clone().cpu() for metric in metrics]
        of_ranks = gathered([[part.metric_state for part in _parts(copy)] for copy in copies])
        for index, (copy, metric) in enumerate(zip(copies, metrics, strict=True)):
            for number, part in enumerate(_parts(copy)):
                for name, reduction in part._reductions.items():
                    setattr(part, name, _reduced([states[index][number][name] for states in of_ranks], reduction))
                part.distributed_available_fn = _is_alone
                part._computed = None
            copy.to(metric.device)
        metrics = copies
    with warnings.catch_warnings():
        # torchmetrics warns about a metric that this rank never updated, but other ranks may have had the task's rows.
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method", category=UserWarning)
        return [metric.compute() for metric in metrics]


def _parts(metric: Metric) -> list[Metric]:
    """A metric and the metrics that it contains."""
    return [module for module in metric.modules() if isinstance(module, Metric)]


def _reduced(parts: list[Any], reduction: Any) -> Any:
    """One state of a metric, combined from its parts on all ranks in the way of torchmetrics."""
    if isinstance(parts[0], Tensor):
        whole: Any = torch.stack(parts)
    else:
        whole = [entry for part in parts for entry in (part if isinstance(part, list) else [part])]
        if not whole:
            return whole
    return whole if reduction is None else reduction(whole)


def _is_alone() -> bool:
    return False

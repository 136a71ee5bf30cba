"""`PromptGradientNorm`: log statistics of each task's gradient and prompt, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.gradients.guard import CollapseGuard
from lightning_softprompt.gradients.stage import GradientStage, about_to_move, optimizer_step
from lightning_softprompt.gradients.statistics import TOTAL, StepStatistics
from lightning_softprompt.prompts import statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 1000  # number of points that the history keeps of each name


class PromptGradientNorm(GradientStage):
    """Log statistics of the gradient and the prompt of each task with rows in a step.

    The names are the same in every logger. In a step that is logged, values are copied from the device once; in other
    steps nothing is computed.

    | name | meaning |
    |---|---|
    | `grad_norm/<task>`, `grad_norm/total` | norm of the gradient, unscaled and accumulated, before any clipping |
    | `grad_norm_clipped/<task>` | norm of the gradient that the optimizer used; 0 if the task's step was skipped |
    | `prompt_norm/<task>` | norm of the prompt `[length, hidden]` before the step |
    | `update_ratio/<task>` | norm of the prompt's change in the step, divided by `prompt_norm` |
    | `token_similarity/<task>` | mean cosine of the prompt's tokens; 1 if they have become one |
    | `effective_rank/<task>` | number of directions that the tokens span, from 1 to the prompt's length |
    | `vocabulary_distance/<task>` | how far the mean token norm is outside the vocabulary's band of norms |
    | `task_similarity` | mean cosine between the mean tokens of every two tasks of the step |

    The vocabulary's band goes from the 1st to the 99th percentile of the norms of its embeddings. The distance is in
    units of their median: 0 inside the band, negative below it. It compares norms alone: a prompt whose tokens are as
    long as words is at 0, however far from each word they are. The progress bar shows the largest gradient norm and
    its task as `grad_norm`.

    With and without a logger, `trainer.callback_metrics` holds the newest value under each of these names, so that
    `EarlyStopping(monitor="grad_norm/total")` and `ModelCheckpoint(monitor=...)` can watch it. A value stays there
    until the next one is logged. A callback that looks at the end of each epoch needs a logged step in the first one.

    Args:
        every_n_steps: how often to log; None means as often as the Trainer logs (`log_every_n_steps`).

    Attributes:
        history: for each name a list of `(step, value)`, which is part of checkpoints. It holds every logged value, but
            at most a thousand of each name (22 KB in a checkpoint): a full list is thinned out, over the whole run, to
            the first value in every 2, 4, 8, ... steps, so that at most 500 are left.

    Raises:
        SoftPromptError: at the start of training, a task named "total"; before a step, an optimizer that unscales its
            gradients only inside the step (precision "16-mixed" with a fused optimizer).

    Example:
        >>> from lightning_softprompt import PromptGradientNorm
        >>> PromptGradientNorm(every_n_steps=10).history
        {}
    """

    order = 0

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise SoftPromptError(f"every_n_steps must be at least 1, or None, got {every_n_steps!r}")
        self.every_n_steps = every_n_steps
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._statistics: StepStatistics | None = None
        self._prompts: dict[str, Tensor] = {}
        self._guard: CollapseGuard | None = None
        self._next = 0
        self._monitored: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Forget the history."""
        self.history = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register a hook that runs after each optimizer's step, and measure the vocabulary's norms."""
        attachment = self.attachment(pl_module)
        self._statistics = None  # of a step that an exception ended
        if TOTAL in attachment.prompts:
            raise SoftPromptError(
                f"a task named {TOTAL!r} and the norm of all tasks would both be logged as grad_norm/{TOTAL}; rename it"
            )
        embedding: Any = attachment.model.get_input_embeddings()
        weight = next(embedding.parameters())
        self._band = statistics.norm_band(embedding, getattr(embedding, "num_embeddings", len(weight)), weight.device)
        # It is one dictionary for the whole fit. Lightning copies metrics from the device whenever it is asked for it.
        self._monitored = trainer.callback_metrics
        self._find_next(trainer)
        self._prompts = {task: attachment.prompts[task] for task in attachment.prompts}
        self._guard = next((c for c in trainer.callbacks if isinstance(c, CollapseGuard)), None)  # type: ignore[attr-defined]
        self._run_after_steps(trainer, self._after_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure gradients and prompts before the step."""
        step = optimizer_step(trainer)
        if not self._next or step + 1 < self._next:
            return
        self.check_gradients_are_unscaled(trainer, optimizer)
        if self._statistics is None or self._statistics.step != step:
            self._statistics = StepStatistics(step)
        self._statistics.before(about_to_move(optimizer, self.attachment(pl_module).prompts))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._statistics is not None:
            self._statistics.after()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured in the step that just ended."""
        measured, self._statistics = self._statistics, None
        if measured is None or not measured.tasks:
            return
        values = measured.values(self._band)
        for name, value in values.items():
            remember(self.history.setdefault(name, []), measured.step, value)
        self._monitored.update(_on_the_cpu(values))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=measured.step)
        every = self._every(trainer)
        self._next = ((measured.step + 1) // every + 1) * every
        worst = max(measured.tasks, key=lambda task: (math.isnan(norm := values[f"grad_norm/{task}"]), norm))
        trainer.progress_bar_metrics["grad_norm"] = f"{worst} {values[f'grad_norm/{worst}']:.2g}"  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """The history, as lists."""
        return {"history": {name: [list(point) for point in points] for name, points in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the saved run."""
        history = state_dict["history"].items()
        self.history = {name: [(int(step), value) for step, value in points] for name, points in history}

    def plot(self) -> Figure:
        """Draw each task's norms over the steps, with clipped steps and the events of `CollapseGuard`.

        A heat map shows how alike the tasks are.

        Returns:
            A matplotlib figure.

        Raises:
            SoftPromptError: nothing was logged yet.
        """
        from lightning_softprompt.gradients.figure import draw

        if not self.history:
            raise SoftPromptError("nothing was logged yet; call plot() after trainer.fit")
        return draw(self.history, self._guard.events if self._guard else [], self._prompts)

    def _find_next(self, trainer: Trainer) -> None:
        """Find the next step to log, counted from 1; in a run that goes on, monitors get the newest values back."""
        every, done = self._every(trainer), optimizer_step(trainer)
        newest = max((points[-1][0] for points in self.history.values()), default=-1)
        # Until its first batch, a resumed run may count one step less than it has taken. A history of later steps, or
        # one that is there before any step, is that of another run.
        if trainer.global_step and 0 <= newest <= done:
            done = newest + 1
            self._monitored.update(_on_the_cpu({name: points[-1][1] for name, points in self.history.items()}))
        self._next = (done // every + 1) * every if every else 0

    def _every(self, trainer: Trainer) -> int:
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]


def remember(points: list[tuple[int, float]], step: int, value: float) -> None:
    """Append a point to a list of the history, which is thinned out first if it is full.

    What is left depends on the steps alone, so that lists of the same steps keep the same ones.
    """
    if len(points) >= MOST_POINTS:
        last, width = max(step for step, _ in points), 1
        while last // width >= MOST_POINTS // 2:
            width *= 2
        first_of: dict[int, tuple[int, float]] = {}
        for point in points:
            first_of.setdefault(point[0] // width, point)
        points[:] = first_of.values()
    points.append((step, value))


def _on_the_cpu(values: Mapping[str, float]) -> dict[str, Tensor]:
    """The values as scalars, `[]`, on the CPU, where reading them waits for nothing."""
    return {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}

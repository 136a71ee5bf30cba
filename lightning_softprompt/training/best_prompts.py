"""`BestPrompts`: each task ends with the prompt that validated best, whenever in the run that was."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_softprompt.attachment.attach import attachment_inside
from lightning_softprompt.errors import check_choice
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

logger = logging.getLogger("lightning_softprompt")

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Best:
    """The best validation of a task so far.

    Attributes:
        value: of the monitored metric.
        step: of the optimizer, at which it was.
        prompt: as it was, `[length, hidden]`.
        metrics: all that was logged for the task there, by name.
    """

    value: float
    step: int
    prompt: Tensor
    metrics: dict[str, float]


class BestPrompts(Callback):
    """At the end of `fit`, put back the prompt with which each task validated best.

    The tasks of a run peak at different steps, and a task of few rows learns them by heart. A checkpoint is the best of
    the run as a whole; prompts are kilobytes, so here each task has its own. Values are compared at each validation. A
    task whose metric is not logged keeps the prompt it ends with.

    Checkpoints of the run hold the prompts as they train, and what is best so far, so that a run can go on.

    Args:
        monitor: the metric. It is read under `<monitor>/<task>`, where `CausalLMModule` and `PerTask` log it.
        mode: whether the least value is the best, or the greatest.

    Attributes:
        best: the best validation of each task so far.

    Raises:
        SoftPromptError: another mode.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_softprompt import BestPrompts, SoftPromptCallback
        >>> callbacks = [SoftPromptCallback(tasks={"topic": 20}), BestPrompts(monitor="val/accuracy", mode="max")]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, monitor: str = "val/loss", mode: Mode = "min") -> None:
        check_choice("mode", mode, Mode)
        self.monitor = monitor
        self.mode = mode
        self.best: dict[str, Best] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In `fit`, and not in its sanity check, keep the prompts of the tasks that are better than before."""
        attachment = attachment_inside(pl_module)
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING and attachment is not None:
            self.consider(attachment.prompts, trainer.callback_metrics, trainer.global_step)

    def consider(self, prompts: SoftPrompts, metrics: Mapping[str, Any], step: int) -> None:
        """Keep the prompts of the tasks that are better by `metrics` than before, or as good.

        Args:
            prompts: as they are now.
            metrics: numbers by the names under which they are logged.
            step: of the optimizer.
        """
        for task in prompts:
            value = metrics.get(f"{self.monitor}/{task}")
            if value is None or not math.isfinite(value):
                continue
            before, prompt = self.best.get(task), prompts[task].detach()
            if before is None or before.prompt.shape != prompt.shape or self._is_as_good(value, before.value):
                of_task = {name: float(each) for name, each in metrics.items() if name.endswith(f"/{task}")}
                self.best[task] = Best(float(value), step, prompt.clone(), of_task)

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the best prompts."""
        attachment = attachment_inside(pl_module)
        prompts = {} if attachment is None else {task: attachment.prompts[task] for task in attachment.prompts}
        for task, prompt in prompts.items():
            best = self.best.get(task)
            if best is None or best.prompt.shape != prompt.shape:
                continue
            if not bool(prompt.isfinite().all()):
                logger.warning(
                    "the prompt of task %r ended with numbers that are not finite, and that of step %d is put back; "
                    "lower the rate, or add CollapseGuard",
                    task,
                    best.step,
                )
            prompt.copy_(best.prompt)

    def _is_as_good(self, value: Any, before: float) -> bool:
        return bool(value <= before if self.mode == "min" else value >= before)

    def state_dict(self) -> dict[str, Any]:
        """The best prompts so far, and their metrics."""
        return {"best": {task: asdict(best) for task, best in self.best.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best prompts of the saved run."""
        self.best = {task: Best(**best) for task, best in state_dict["best"].items()}

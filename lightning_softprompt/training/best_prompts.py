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
from torch import Tensor, nn

from lightning_softprompt.attachment.attach import attachment_inside
from lightning_softprompt.errors import SoftPromptError, check_choice

logger = logging.getLogger("lightning_softprompt")

Mode = Literal["min", "max"]
MONITORS: dict[str, Mode] = {"val/accuracy": "max", "val/loss": "min"}
AMONG_LABELS: dict[str, Mode] = {"val/accuracy": "max", "val/label_loss": "min", "val/loss": "min"}


@dataclass(frozen=True)
class Best:
    """The best validation of a task so far.

    Attributes:
        values: what was compared, by the names of the metrics.
        step: of the optimizer, at which it was.
        prompt: as it was, `[length, hidden]`.
        metrics: all that was logged for the task there, by name.
    """

    values: dict[str, float]
    step: int
    prompt: Tensor
    metrics: dict[str, float]


class BestPrompts(Callback):
    """At the end of `fit`, put back the prompt with which each task validated best.

    The tasks of a run peak at different steps, and a task of few rows learns them by heart. A checkpoint is the best of
    the run as a whole; prompts are kilobytes, so here each task has its own. They are compared at each validation, with
    the weights that were validated, also where these are averages. A task none of whose metrics is logged keeps the
    prompt it ends with, and so do all tasks if nothing was validated behind the first step.

    Checkpoints of the run hold the prompts as they train, and what is best so far, so that a run can go on. Where
    several processes train, all of them have to log the same values (`sync_dist=True`).

    Args:
        monitors: metrics, and whether the least value of each is the best, or the greatest. They are read under
            `<metric>/<task>`, where `CausalLMModule` and `PerTask` log them. The first that is logged for a task
            decides, and the next where it is equal. None means the accuracy, and then the loss: on 16 rows a task that
            was better than the loss alone (docs/learning.md).

    Attributes:
        best: the best validation of each task so far.
        validated: the step of the newest validation; None before.

    Raises:
        SoftPromptError: another mode, or no metric.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_softprompt import BestPrompts, SoftPromptCallback
        >>> callbacks = [SoftPromptCallback(tasks={"topic": 20}), BestPrompts({"val/f1": "max"})]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, monitors: dict[str, Mode] | None = None) -> None:
        self.monitors = dict(MONITORS if monitors is None else monitors)
        if not self.monitors:
            raise SoftPromptError("monitors must name at least one metric, for example {'val/loss': 'min'}")
        for mode in self.monitors.values():
            check_choice("the mode of a metric", mode, Mode)
        self.best: dict[str, Best] = {}
        self.validated: int | None = None
        self._prompts: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before `fit`, forget the run before; a checkpoint tells of its own later."""
        if stage == "fit":
            self.best, self.validated = {}, None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the prompts of a validation that an exception ended."""
        self._prompts = {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the prompts that are validated: callbacks that average weights take theirs away before the end."""
        if not self._prompts:  # before the first batch, of whichever loader: some may be empty
            self._prompts = prompts_of(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In `fit`, and not in its sanity check, keep the prompts of the tasks that are better than before."""
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING:
            self.consider(self._prompts, trainer.callback_metrics, trainer.global_step)
        self._prompts = {}

    def consider(self, prompts: Mapping[str, Tensor], metrics: Mapping[str, Any], step: int) -> None:
        """Keep the prompts of the tasks that are better by `metrics` than before.

        Args:
            prompts: by task, as they were when they were measured.
            metrics: numbers by the names under which they are logged.
            step: of the optimizer.
        """
        self.validated = step
        for task, prompt in prompts.items():
            of_task = {name: float(each) for name, each in metrics.items() if name.endswith(f"/{task}")}
            values = {name: of_task[f"{name}/{task}"] for name in self.monitors if f"{name}/{task}" in of_task}
            before = self.best.get(task)
            if not values or not all(map(math.isfinite, values.values())):
                continue
            if before is None or before.prompt.shape != prompt.shape or self._rank(values) > self._rank(before.values):
                self.best[task] = Best(values, step, prompt, of_task)

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the best prompts."""
        attachment = attachment_inside(pl_module)
        if attachment is None or not self.validated:
            return
        if not self.best:
            logger.warning(
                "no validation logged a finite %s, so that each task keeps the prompt it ends with; name metrics that "
                "are logged for each task",
                " or ".join(f"{name}/<task>" for name in self.monitors),
            )
        for task in attachment.prompts:
            prompt, best = attachment.prompts[task], self.best.get(task)
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

    def _rank(self, values: dict[str, float]) -> list[float]:
        """The values in the order of the metrics, so that a greater one is better."""
        return [-value if self.monitors[name] == "min" else value for name, value in values.items()]

    def state_dict(self) -> dict[str, Any]:
        """The best prompts so far, and their metrics."""
        return {"best": {task: asdict(best) for task, best in self.best.items()}, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best prompts of the saved run."""
        self.best = {task: Best(**best) for task, best in state_dict["best"].items()}
        self.validated = state_dict["validated"]


def prompts_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the prompts that are attached inside a module, by task; none where none are."""
    attachment = attachment_inside(module)
    with torch.inference_mode(False):  # what is cloned inside it could never be trained on
        if attachment is None:
            return {}
        return {task: attachment.prompts[task].detach().clone() for task in attachment.prompts}

"""`CausalLMModule`: the LightningModule that runs from a config use."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW
from torchmetrics.aggregation import MeanMetric

from lightning_softprompt.attachment.attach import attach, attachment_of
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.loading import load_causal_lm
from lightning_softprompt.base.packed_linear import pack_linear_layers
from lightning_softprompt.base.padding import pad_token_id
from lightning_softprompt.data.datamodule import TaskDataModule
from lightning_softprompt.errors import SoftPromptError, check_at_least_one
from lightning_softprompt.inference.answers import TextAnswers
from lightning_softprompt.inference.ranking import RankedRow, among_labels, score_tokens
from lightning_softprompt.inference.task_answers import TaskAnswers
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.training.agreement import check_targets
from lightning_softprompt.training.objectives import Objective, row_losses, task_means, tasks_among_labels, token_losses
from lightning_softprompt.training.per_task import PerTask
from lightning_softprompt.training.schedule import as_configured, warm_up_and_cosine
from lightning_softprompt.training.wiring import Wiring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLMModule(LightningModule):
    """A frozen causal LM whose soft prompts train on the batches of a `TaskDataModule`.

    Training logs `train/loss`, which is minimised, and for each task that on which it trains: `train/loss/<task>`, the
    loss of a target's token, or `train/label_loss/<task>`, that of a label among the task's labels. Validation and test
    log, with `val` or `test` in place of `…`:

    - `…/loss/<task>`, the loss of a target's token over the vocabulary; for tasks with labels also
      `…/label_loss/<task>`, that of a label among the task's labels, and `…/accuracy/<task>`, whose answer is the label
      that is likeliest among them;
    - `…/loss`, `…/label_loss` and `…/accuracy`, the means over tasks;
    - `…/loss_micro`, `…/label_loss_micro` and `…/accuracy_micro`, the means over rows (for the loss of free text, over
      tokens).

    Prediction returns one answer per row, without surrounding space: the likeliest label, or generated text for tasks
    without labels.

    `CausalLMModule.load_from_checkpoint(path, base=…)` gives a module whose `model` answers with the checkpoint's
    prompts. It needs no Trainer.

    Args:
        base: hub id or path of the causal LM.
        optimizer: makes the optimizer from the trainable parameters. Soft prompts need learning rates some hundreds of
            times those of fine-tuning, and no weight decay, which would pull virtual tokens towards zero.
        lr_scheduler: makes the scheduler from the optimizer; it is stepped after every step of the optimizer, or, a
            `ReduceLROnPlateau`, after every epoch that validates, by `val/loss` (`val/accuracy` in mode "max") unless
            it names a monitor. None means linear warm-up from above zero, then cosine decay to zero.
        warmup_fraction: the fraction of all steps that the warm-up takes; not used if `lr_scheduler` is given.
        max_new_tokens: the most tokens a generated answer may have.
        objective: what a task trains on. "tokens": the loss of its target's tokens over the vocabulary. "labels": for
            tasks that have labels, the loss of the label among them, which `label_loss` describes. "auto": "tokens".
            What is minimised is the mean over all tokens and all labels of a batch.

    Attributes:
        model: the causal LM, from `configure_model` on.
        lr: the rate of all parameters, in place of the optimizer's own; None keeps that. `Tuner.lr_find` sets it.
        answers: what the last prediction step answered, with probabilities and failures; None before.

    Raises:
        SoftPromptError: a `max_new_tokens` or `warmup_fraction` out of its range. In setup, a run without a
            `TaskDataModule`, a row without a target, or an objective that its tasks do not allow; in
            `configure_optimizers`, a run without prompts, or one without an end and a schedule.
    """

    # The metric, without its stage, by which a scheduler judges that waits for a minimum or a maximum.
    _judged: ClassVar[Mapping[str, str]] = {"min": "loss", "max": "accuracy"}
    _needs_targets: ClassVar[bool] = True

    def __init__(
        self,
        base: str,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=0.02, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_fraction: float = 0.1,
        max_new_tokens: int = 64,
        objective: Objective = "auto",
    ) -> None:
        super().__init__()
        check_at_least_one(max_new_tokens=max_new_tokens)
        if not 0 <= warmup_fraction <= 1:
            raise SoftPromptError(f"warmup_fraction is a part of all steps, between 0 and 1, got {warmup_fraction}")
        self.base = base
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_fraction = warmup_fraction
        self.max_new_tokens = max_new_tokens
        self.objective = objective
        self.lr: float | None = None
        self.model: PreTrainedModel | None = None
        self.answers: TextAnswers | None = None

    def configure_model(self) -> None:
        """Load the base model. On a CPU its weights are packed, and a step takes about half of the time."""
        if self.model is None:
            self.model = load_causal_lm(self.base)
            if self._trainer is not None and self._multiplies_float32_on_a_cpu():
                pack_linear_layers(self.model)

    def _multiplies_float32_on_a_cpu(self) -> bool:
        return self.trainer.strategy.root_device.type == "cpu" and self.trainer.precision == "32-true"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Without a Trainer, as in `load_from_checkpoint`, attach the prompts of the checkpoint."""
        if self._trainer is None and attachment_of(self._lm) is None:
            prompts = SoftPrompts.from_checkpoint(checkpoint)
            Wiring.install(self, None, partial(attach, prompts=prompts)).attach_if_built()

    def setup(self, stage: str) -> None:
        """Make the metrics for the tasks of the datamodule, and find out on what each of them trains."""
        tasks = list(self.datamodule.tasks)
        if self._needs_targets:
            check_targets(self.datamodule)
        self._among_labels = tasks_among_labels(self.objective, self.datamodule.tasks)
        # Anew in each run, which may have other tasks. A run that was interrupted leaves its rows in them, too.
        self.losses = PerTask(MeanMetric(), tasks)
        self.label_losses = PerTask(MeanMetric(), tasks)
        self.accuracies = PerTask(MeanMetric(), tasks)

    @property
    def datamodule(self) -> TaskDataModule:
        """The run's `TaskDataModule`."""
        found = getattr(self.trainer, "datamodule", None)
        if not isinstance(found, TaskDataModule):
            raise SoftPromptError(
                f"{type(self).__name__} reads the batches of a TaskDataModule, this run has {type(found).__name__}; "
                "pass datamodule=TaskDataModule(…), or use SoftPromptCallback with a LightningModule of your own"
            )
        return found

    def configure_optimizers(self) -> Any:
        """The optimizer of the trainable parameters, and its learning-rate scheduler."""
        if attachment_of(self._lm) is None:
            raise SoftPromptError(
                f"{type(self).__name__} trains soft prompts; add SoftPromptCallback(tasks=…) to the Trainer"
            )
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.lr_scheduler is not None:
            scheduler: Any = self.lr_scheduler(optimizer)
        else:
            steps = self.trainer.estimated_stepping_batches
            if math.isinf(steps):
                raise SoftPromptError(
                    "the rate of a run without an end cannot fall to zero at it; set max_steps or max_epochs, or give "
                    "an lr_scheduler"
                )
            scheduler = warm_up_and_cosine(optimizer, max(1, round(steps * self.warmup_fraction)), int(steps))
        is_validated = bool(self.datamodule.sources["validation"]) and self.trainer.limit_val_batches != 0
        configured = as_configured(scheduler, self._judged, is_validated, self.trainer.check_val_every_n_epoch)
        return {"optimizer": optimizer, "lr_scheduler": configured}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The mean loss over the batch's targets: tokens, and labels of tasks that train among them."""
        losses, counts = self._row_losses(batch)
        for task, value in task_means(losses.detach(), counts, batch["tasks"]).items():
            name = f"train/label_loss/{task}" if task in self._among_labels else f"train/loss/{task}"
            self.log(name, value, batch_size=batch["tasks"].count(task), on_step=True, on_epoch=False)
        loss = losses.sum() / counts.sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(counts))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the metrics of each row's task."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the metrics of each row's task."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("test")

    @torch.no_grad()
    def measure(self, batches: Iterable[dict[str, Any]], with_prompts: bool = True) -> dict[str, float]:
        """What validation would log for these batches, without its stage: `loss/<task>`, `accuracy`, and so on.

        Every rank has to call it. Without prompts, rows are those of the bare model.
        """
        for batch in batches:
            self._evaluate(batch, with_prompts)
        return {name: float(value) for name, value in self._computed().items()}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str | None]:
        """One answer per row; None for a row that cannot be answered. A warning gives the reasons."""
        data, tasks = self.datamodule, batch["tasks"]
        texts = [text_ids(batch, index) for index in range(len(tasks))]
        answers = TaskAnswers(self._lm, data.tokenizer, data.tasks)
        self.answers = answers.answer(texts, tasks, self.max_new_tokens)
        return [*self.answers]  # Lightning would rebuild a list of another type without what it holds beside its items

    @property
    def _lm(self) -> PreTrainedModel:
        assert self.model is not None
        return self.model

    def _row_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of each row to train on, and over how many targets it is summed: float32 and int64 `[batch]`."""
        label_ids = {task: self.datamodule.label_ids(task) or [] for task in self._among_labels}
        return row_losses(*self._scored(batch), batch["tasks"], label_ids)

    def _scored(self, batch: dict[str, Any], with_prompts: bool = True) -> tuple[Tensor, Tensor]:
        """The logits and the labels of the last columns, in which all targets end: all that any loss needs."""
        labels = batch["labels"]
        first = int((labels != -100).any(0).int().argmax())
        logits = self._lm(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            tasks=batch["tasks"] if with_prompts else [None] * len(labels),
            logits_to_keep=labels.shape[1] - first + 1,
        ).logits
        return logits, labels[:, first - 1 :]

    def _score(self, batch: dict[str, Any], indices: list[int], with_prompts: bool) -> list[list[list[float]]]:
        """The log-probability of each token of each label of the rows at `indices`."""
        rows = []
        for index in indices:
            labels = self.datamodule.label_ids(batch["tasks"][index])
            task = batch["tasks"][index] if with_prompts else None
            rows.append(RankedRow(text_ids(batch, index), task, labels or []))
        return score_tokens(self._lm, rows, pad_token_id(self.datamodule.tokenizer, vocabulary_size(self._lm)))

    def _evaluate(self, batch: dict[str, Any], with_prompts: bool = True) -> None:
        data, tasks = self.datamodule, batch["tasks"]
        ranked = [index for index, task in enumerate(tasks) if data.tasks[task].labels]
        if ranked:
            losses, label_losses, hits = [], [], []
            for index, scores in zip(ranked, self._score(batch, ranked, with_prompts), strict=True):
                row = batch["labels"][index]
                target = row[row != -100].tolist()
                labels = data.label_ids(tasks[index]) or []
                gold, probabilities = labels.index(target), among_labels(labels, scores)
                losses.append(-sum(scores[gold]) / len(target))
                label_losses.append(-math.log(max(probabilities[gold], sys.float_info.min)))
                hits.append(float(probabilities.index(max(probabilities)) == gold))
            names = [tasks[index] for index in ranked]
            self.losses.update(names, torch.tensor(losses, device=self.device))
            self.label_losses.update(names, torch.tensor(label_losses, device=self.device))
            self.accuracies.update(names, torch.tensor(hits, device=self.device))
        rest = [index for index in range(len(tasks)) if index not in set(ranked)]
        if rest:
            rows = torch.tensor(rest, device=batch["labels"].device)
            tensors = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")}
            names = [tasks[index] for index in rest]
            summed, counts = token_losses(*self._scored({**tensors, "tasks": names}, with_prompts))
            self.losses.update(names, summed / counts, counts)

    def _log_metrics(self, stage: str) -> None:
        for name, value in self._computed().items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "accuracy"), sync_dist=True)

    def _computed(self) -> dict[str, Tensor]:
        """The metrics of the rows since the last call."""
        metrics = {"loss": self.losses, "label_loss": self.label_losses, "accuracy": self.accuracies}
        found: dict[str, Tensor] = {}
        for name, metric in metrics.items():
            found |= metric.scalars(name)
            metric.reset()
        return found


def text_ids(batch: dict[str, Any], index: int) -> list[int]:
    """The ids of a row's text, without its target and its pads."""
    kept = batch["attention_mask"][index] != 0
    if "labels" in batch:
        kept = kept & (batch["labels"][index] == -100)
    return batch["input_ids"][index][kept].tolist()

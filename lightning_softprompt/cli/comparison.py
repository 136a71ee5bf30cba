"""The table at the end of `fit`: what prompts gained on the validation rows, over no prompt and over their start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_softprompt.cli.output import progress_bar
from lightning_softprompt.distributed import gathered
from lightning_softprompt.prompts.initializers import Text, Tokens
from lightning_softprompt.training.best_prompts import BestPrompts, prompts_of
from lightning_softprompt.training.module import CausalLMModule

KEY = "soft_prompt_results"  # of a checkpoint
_BEFORE = ("no prompt", "start")
_COLUMNS = ("task", "measured", "rows", "no prompt", "start", "hard prompt", "tuned", "of step")

Metrics = dict[str, float]  # by name without the stage, as "accuracy/topic"


class Comparison(Callback):
    """Measures a `CausalLMModule` on the validation rows before its first step, without and with the prompts' starts.

    Checkpoints hold what was measured, and the metrics at their own time. So a run that goes on from one measures
    nothing twice, and the best checkpoint says how good it is.

    Args:
        best: is told how good the starts are, so that no task ends below its start; None for none.

    Attributes:
        before: the metrics by "no prompt" and "start"; empty where nothing could be measured.
        rows: over how many validation rows of each task.
    """

    def __init__(self, best: BestPrompts | None = None) -> None:
        self.best = best
        self.before: dict[str, Metrics] = {}
        self.rows: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, unless a checkpoint told."""
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        count = int(sum(trainer.num_val_batches))
        if self.before or not isinstance(pl_module, CausalLMModule) or not count:
            return
        names = _BEFORE if trainer.global_step == 0 else _BEFORE[:1]  # where prompts have trained, their start is gone
        self.before = self._measured(trainer, pl_module, "before training", names)
        if "start" in self.before:
            self._consider(pl_module, self.before["start"], 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the prompts that the run ends with, if no validation did: `max_steps` often ends an epoch early."""
        is_measured = self.best is None or self.best.validated == trainer.global_step
        if is_measured or not isinstance(pl_module, CausalLMModule) or not sum(trainer.num_val_batches):
            return
        found = self._measured(trainer, pl_module, "after training", ("tuned",))
        self._consider(pl_module, found["tuned"], trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put in what was measured, and the metrics of now."""
        checkpoint[KEY] = {**self.before, "tuned": of_stage(trainer.callback_metrics), "rows": self.rows}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take out what was measured."""
        results = checkpoint.get(KEY, {})
        self.before = {name: results[name] for name in _BEFORE if name in results}
        self.rows = results.get("rows", {})

    def _measured(
        self, trainer: Trainer, pl_module: CausalLMModule, when: str, names: tuple[str, ...]
    ) -> dict[str, Metrics]:
        """The metrics on the validation rows, by name: with the prompts as they are, and as "no prompt" without."""
        count = int(sum(trainer.num_val_batches))
        is_shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        bar = progress_bar(when, len(names) * count, 0, "batches") if is_shown else nullcontext(lambda step: None)
        with bar as advance, trainer.precision_plugin.val_step_context():
            tasks: list[str] = []
            found = {
                name: pl_module.measure(_batches(trainer, count, advance, tasks), with_prompts=name != "no prompt")
                for name in names
            }
        of_ranks = Counter(task for on_rank in gathered(tasks) for task in on_rank)
        self.rows = {task: times // len(names) for task, times in of_ranks.items()}
        return found

    def _consider(self, pl_module: LightningModule, metrics: Metrics, step: int) -> None:
        if self.best is not None:
            named = {f"val/{name}": value for name, value in metrics.items()}
            self.best.consider(prompts_of(pl_module), named, step)

    def tuned(self, logged: Mapping[str, Any]) -> Metrics:
        """The metrics of the prompts that a run ends with, by what was logged last, and by what was best."""
        metrics = of_stage(logged)
        for each in self.best.best.values() if self.best is not None else ():
            metrics |= of_stage(each.metrics)
        return metrics

    def table(self, starts: Mapping[str, Any], tuned: Metrics, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
        """A row for each task that was measured: its accuracy in percent, divergence or loss before and after training.

        Where each task keeps its best prompt, the row says of which step that is; 0 is the start.

        Args:
            starts: how each task's prompt started. A text is that hard prompt.
            tuned: the metrics of the prompts that are kept.
            tasks: the tasks, in the order of the table.
        """
        rows = []
        for task in tasks:
            names = (f"accuracy/{task}", f"divergence/{task}", f"loss/{task}")
            name = next((each for each in names if each in tuned), None)
            if name is None:
                continue
            measured, _, _ = name.partition("/")
            is_hard = isinstance(starts.get(task), str | Text | Tokens) and measured != "divergence"  # from another one
            start = "hard prompt" if is_hard else "start"
            before = [self.before.get(each, {}) for each in _BEFORE]
            found = dict(zip(("no prompt", start, "tuned"), (*before, tuned), strict=True))
            factor = 100 if measured == "accuracy" else 1
            values = {column: metrics[name] * factor for column, metrics in found.items() if name in metrics}
            best = self.best.best.get(task) if self.best is not None else None
            step = {} if best is None else {"of step": best.step}
            what = "accuracy, %" if factor == 100 else measured
            over = {"rows": self.rows[task]} if task in self.rows else {}
            rows.append({"task": task, "measured": what, **over, **values, **step})
        columns = [name for name in _COLUMNS if any(name in row for row in rows)]
        return [{name: row.get(name) for name in columns} for row in rows]


def of_stage(metrics: Mapping[str, Any]) -> Metrics:
    """What validation logged, by name without `val/`."""
    return {name.removeprefix("val/"): float(metrics[name]) for name in sorted(metrics) if name.startswith("val/")}


def _batches(trainer: Any, count: int, advance: Any, tasks: list[str]) -> Iterator[Any]:
    """The validation batches; `tasks` gets the task of each row of them."""
    for batch in islice(trainer.val_dataloaders, count):
        tasks += batch["tasks"]
        yield trainer.strategy.batch_to_device(batch)
        advance(1)

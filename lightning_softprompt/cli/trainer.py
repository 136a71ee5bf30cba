"""The commands of the Trainer: `fit`, `validate`, `test` and `predict` run a config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_softprompt.attachment.attachment import SUBMODULE
from lightning_softprompt.cli.output import say, write_rows
from lightning_softprompt.data.datamodule import TaskDataModule
from lightning_softprompt.distributed import gathered
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.gradients import PromptGradientClipping
from lightning_softprompt.training.callback import SoftPromptCallback
from lightning_softprompt.training.module import CausalLMModule


class SoftPromptCLI(LightningCLI):
    """LightningCLI with the arguments of `SoftPromptCallback` under `prompts`.

    Unless the config says something about clipping, the gradient of each task is clipped to norm 1.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments `prompts` and `json`."""
        parser.add_lightning_class_args(SoftPromptCallback, "prompts")
        parser.add_argument("--json", type=bool, default=False, help="Print what was done as JSON, and nothing else.")

    def before_instantiate_classes(self) -> None:
        """Add clipping if the config says nothing about it. With `json`, redirect everything else to stderr."""
        self._stdout = sys.stdout
        if self._get(self.config, "json"):
            sys.stdout = sys.stderr
        trainer = self._get(self.config, "trainer")
        callbacks = trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        made_from = [locate(callback.class_path) for callback in callbacks]  # classes, or functions that make callbacks
        clips = any(isinstance(each, type) and issubclass(each, PromptGradientClipping) for each in made_from)
        if trainer.gradient_clip_val is None and not clips:
            path = f"{PromptGradientClipping.__module__}.{PromptGradientClipping.__name__}"
            trainer.callbacks = [*callbacks, Namespace(class_path=path, init_args=Namespace())]

    def after_fit(self) -> None:
        """Save the prompts in a folder; the best ones, if a checkpoint callback monitors a metric."""
        trainer: Any = self.trainer
        callback = next(c for c in trainer.callbacks if isinstance(c, SoftPromptCallback))
        assert callback.prompts is not None
        savings = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        savings.sort(key=lambda each: each.monitor is None)
        saving: Any = savings[0] if savings else None
        best = Path(saving.best_model_path) if saving is not None and saving.monitor else None
        if best is not None and best.is_file() and trainer.is_global_zero:  # FSDP2 saves a folder of parts instead
            state = torch.load(best, weights_only=True)["state_dict"]
            marker = f".{SUBMODULE}."
            callback.prompts.load_state_dict({k.split(marker)[1]: v for k, v in state.items() if marker in k})
        log_dir, metrics = trainer.log_dir, self._metrics()  # every rank must read them, as they are communicated
        if self.trainer.is_global_zero:
            folder = Path(log_dir or self.trainer.default_root_dir) / "prompts"
            callback.prompts.save_pretrained(folder)
            checkpoint = saving.best_model_path or saving.last_model_path if saving is not None else None
            done = {"prompts": str(folder), "tasks": list(callback.prompts.tasks), "steps": trainer.global_step}
            if best is not None:
                score = saving.best_model_score
                done |= {"monitor": saving.monitor, "best": None if score is None else float(score)}
            self._say({**done, "checkpoint": checkpoint or None, **metrics}, f"prompts saved in {folder}")

    def after_validate(self) -> None:
        """With `json`, print the metrics; without it, Lightning's table has shown them."""
        self._say(self._metrics())

    def after_test(self) -> None:
        """With `json`, print the metrics; without it, Lightning's table has shown them."""
        self._say(self._metrics())

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write one JSON line per row, with its task and answer, to `predictions.jsonl`.

        Raises:
            SoftPromptError: after everything is written, if a row has no answer.
        """
        writer = _AnswerWriter()
        trainer: Any = self.trainer
        trainer.callbacks.append(writer)
        trainer.predict(model, **{**kwargs, "return_predictions": False})
        log_dir = trainer.log_dir  # every rank must read it, as it is communicated
        if not trainer.is_global_zero:
            return
        data: Any = self.datamodule
        examples = data.examples["predict"]
        reached = sorted(writer.answers)  # limit_predict_batches may leave rows out
        answers = [writer.answers[row] for row in reached]
        path = Path(log_dir or trainer.default_root_dir) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"task": examples[row].task, "answer": writer.answers[row]} for row in reached]
        write_rows(path, rows)
        done = {"predictions": str(path), "rows": len(rows), "failed": answers.count(None)}
        self._say(done, f"{len(rows)} predictions written to {path}")
        if None in answers:
            raise SoftPromptError(
                f"{answers.count(None)} of {len(rows)} rows have no answer, first row {answers.index(None) + 1}: "
                f"null in {path}; the reasons are logged above"
            )

    def _metrics(self) -> dict[str, dict[str, float]]:
        return {"metrics": {name: float(value) for name, value in self.trainer.callback_metrics.items()}}

    def _say(self, done: dict[str, Any], text: str | None = None) -> None:
        as_json = self._get(self.config, "json")
        if self.trainer.is_global_zero and (as_json or text is not None):
            say(done, as_json, text or "", self._stdout)


class _AnswerWriter(BasePredictionWriter):
    """Collects the answers of all ranks, each under the number of its row."""

    def __init__(self) -> None:
        super().__init__("epoch")
        self.answers: dict[int, str | None] = {}

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Collect the answers. Lightning calls this on every rank, with the rank's answers and its rows' numbers."""
        mine = [answer for batch in predictions for answer in batch]
        numbers = [number for batch in batch_indices[0] for number in batch]
        for of_rank in gathered(dict(zip(numbers, mine, strict=True))):
            self.answers.update(of_rank)


def run(arguments: list[str]) -> None:
    """Run the command line of one of the Trainer's commands.

    Raises:
        SoftPromptError: settings with which Lightning cannot run, such as devices that do not exist.
    """
    try:
        with redirect_stdout(sys.stdout):  # restores stdout, which before_instantiate_classes may change
            SoftPromptCLI(
                CausalLMModule,
                TaskDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"prog": "lightning-softprompt"},
                args=arguments,
            )
    except MisconfigurationException as error:
        raise SoftPromptError(str(error)) from error

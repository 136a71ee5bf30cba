"""The commands of the Trainer: `fit`, `validate`, `test` and `predict` run a config."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_softprompt.attachment.attachment import SUBMODULE
from lightning_softprompt.cli.output import say, write_rows
from lightning_softprompt.cli.predictions import PredictionCollector
from lightning_softprompt.data.datamodule import TaskDataModule
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.gradients import PromptGradientClipping
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.training.callback import SoftPromptCallback
from lightning_softprompt.training.launchers import check_launcher
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

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train. However a run ends, its prompts are left in the folder in which a complete run leaves them.

        Raises:
            SystemExit: a signal ended the run; the exit status is 130 for SIGINT and 143 for SIGTERM.
        """
        trainer: Any = self.trainer
        check_launcher(trainer)  # here it is one line; in a process that the launcher starts, it would be a traceback
        self._log_dir = _LogDir()
        trainer.callbacks.append(self._log_dir)
        try:
            trainer.fit(model, **kwargs)
        except BaseException as error:  # signals, too
            # Lightning 2.6 exits with 1 where SIGINT interrupts a run, and with 0 where SIGTERM does.
            status = 130 if isinstance(error.__context__, KeyboardInterrupt) else None
            status = 143 if isinstance(error, SIGTERMException) else status
            if trainer.is_global_zero and self._prompts and trainer.global_step > 0:
                self._leave_prompts(ended_by={130: "SIGINT", 143: "SIGTERM"}.get(status or 1, type(error).__name__))
            if status is not None:
                raise SystemExit(status) from error
            raise

    def after_fit(self) -> None:
        """Save the prompts in a folder; the best ones, if a checkpoint callback monitors a metric."""
        metrics = self._metrics()  # every rank must read them, as they are communicated
        if self.trainer.is_global_zero:
            self._leave_prompts(metrics=metrics)

    @property
    def _prompts(self) -> SoftPrompts | None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(each for each in callbacks if isinstance(each, SoftPromptCallback)).prompts

    def _leave_prompts(self, ended_by: str | None = None, metrics: dict[str, Any] | None = None) -> None:
        """Save the prompts and say where; if something ended the run early, say how to go on.

        Prompts that are not finite are left out, so that the others are not lost with them.

        Raises:
            SoftPromptError: at the end of a complete run, if a prompt was left out.
        """
        trainer, prompts = self.trainer, self._prompts
        assert prompts is not None
        best = _load_best(prompts, trainer)
        spoilt = [task for task in prompts if not bool(prompts[task].isfinite().all())]
        kept = prompts.subset(task for task in prompts if task not in spoilt) if spoilt else prompts
        folder = Path(self._log_dir.path or trainer.default_root_dir) / "prompts"
        if len(kept):
            kept.save_pretrained(folder)
        text = f"prompts saved in {folder}" if len(kept) else "no prompts saved"
        if spoilt:
            text += f", without {', '.join(map(repr, spoilt))}: they hold NaN or Inf"
        checkpoint = _newest_checkpoint(trainer) if ended_by else _named_checkpoint(trainer)
        done = {"prompts": str(folder) if len(kept) else None, "tasks": list(kept.tasks), "steps": trainer.global_step}
        done |= {"not_finite": spoilt} if spoilt else {}
        if ended_by:
            done["ended_by"] = ended_by
            text += f"; {ended_by} ended the run after {trainer.global_step} steps. To go on, run fit again with "
            text += f"--ckpt_path {checkpoint}" if checkpoint else f"--prompts.tasks {folder}"
        self._say({**done, **best, "checkpoint": checkpoint, **(metrics or {})}, text)
        if spoilt and not ended_by:
            raise SoftPromptError(
                f"{text}. Train these again, at a lower rate or with PromptGradientClipping and CollapseGuard"
            )

    def after_validate(self) -> None:
        """With `json`, print the metrics; without it, Lightning's table has shown them."""
        self._say(self._metrics())

    def after_test(self) -> None:
        """With `json`, print the metrics; without it, Lightning's table has shown them."""
        self._say(self._metrics())

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        """Judge trained prompts.

        Raises:
            SoftPromptError: neither a checkpoint nor trained prompts are given.
        """
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        tasks = next(each for each in callbacks if isinstance(each, SoftPromptCallback)).tasks
        if kwargs.get("ckpt_path") is None and isinstance(tasks, Mapping):
            raise SoftPromptError(
                "test judges trained prompts, and there are none; give --ckpt_path CHECKPOINT, or "
                "--prompts.tasks FOLDER, where fit left them"
            )
        self.trainer.test(model, **kwargs)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write the rows with their tasks and answers to `predictions.jsonl`, one JSON line per row.

        Raises:
            SoftPromptError: after everything is written, if a row has no answer.
        """
        collector = PredictionCollector()
        trainer: Any = self.trainer
        trainer.callbacks.append(collector)
        trainer.predict(model, **{**kwargs, "return_predictions": False})
        log_dir = trainer.log_dir  # every rank must read it, as it is communicated
        if not trainer.is_global_zero:
            return
        path = Path(log_dir or trainer.default_root_dir) / "predictions.jsonl"
        rows = collector.rows(self.datamodule)
        write_rows(path, rows)
        failed = [row["error"] for row in rows if "error" in row]
        done = {"predictions": str(path), "rows": len(rows), "failed": len(failed)}
        self._say(done, f"{len(rows)} predictions written to {path}")
        if failed:
            raise SoftPromptError(
                f'{len(failed)} of {len(rows)} rows have no answer, and the reason as their "error" in {path}; '
                f"the first: {failed[0]}"
            )

    def _metrics(self) -> dict[str, dict[str, float]]:
        return {"metrics": {name: float(value) for name, value in self.trainer.callback_metrics.items()}}

    def _say(self, done: dict[str, Any], text: str | None = None) -> None:
        as_json = self._get(self.config, "json")
        if self.trainer.is_global_zero and (as_json or text is not None):
            say(done, as_json, text or "", self._stdout)


class _LogDir(Callback):
    """Remembers the Trainer's folder from the start of a run: every rank must read it, which is too late at its end."""

    def __init__(self) -> None:
        self.path: str | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the folder."""
        self.path = trainer.log_dir


def _savings(trainer: Any) -> list[ModelCheckpoint]:
    """The Trainer's `ModelCheckpoint`s, those that monitor a metric first."""
    found = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return sorted(found, key=lambda each: each.monitor is None)


def _load_best(prompts: SoftPrompts, trainer: Any) -> dict[str, Any]:
    """Give the prompts their best values, if a metric is monitored, and return what the command says of that."""
    saving = next(iter(_savings(trainer)), None)
    if saving is None or not saving.monitor:
        return {}
    best, score = Path(saving.best_model_path), saving.best_model_score
    if best.is_file():  # FSDP2 saves a folder of parts instead
        state = torch.load(best, weights_only=True)["state_dict"]
        marker = f".{SUBMODULE}."
        prompts.load_state_dict({k.split(marker)[1]: v for k, v in state.items() if marker in k})
    return {"monitor": saving.monitor, "best": None if score is None else float(score)}


def _named_checkpoint(trainer: Any) -> str | None:
    """The checkpoint that a complete run names: the best one, or the last one if there is no best one."""
    return next((each.best_model_path or each.last_model_path or None for each in _savings(trainer)), None)


def _newest_checkpoint(trainer: Any) -> str | None:
    """The checkpoint from which an interrupted run goes on; None if there is none."""
    paths = [each.ckpt_path for each in trainer.checkpoint_callbacks if isinstance(each, OnExceptionCheckpoint)]
    for each in _savings(trainer):
        paths += [each.last_model_path, each.best_model_path, *each.best_k_models]
    return max(filter(os.path.exists, paths), key=os.path.getmtime, default=None)


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

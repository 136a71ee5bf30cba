"""The commands of the Trainer: `fit`, `validate`, `test` and `predict` run a config."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from functools import reduce
from operator import or_
from pathlib import Path
from pickle import UnpicklingError
from pydoc import locate
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, Namespace
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_softprompt.cli.checkpoint_argument import check_checkpoint_argument, loads_weights_only
from lightning_softprompt.cli.comparison import Comparison
from lightning_softprompt.cli.distill import beside_teachers, print_fidelity
from lightning_softprompt.cli.outcome import Outcome, exit_status, how_to_go_on, how_to_serve, leave_prompts
from lightning_softprompt.cli.output import print_table, say, write_rows
from lightning_softprompt.cli.predictions import PredictionCollector
from lightning_softprompt.cli.terminal import quiet_callbacks, quiet_loggers
from lightning_softprompt.cli.usage import OneLine
from lightning_softprompt.data.datamodule import TaskDataModule
from lightning_softprompt.data.sources import no_source
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.gradients import PromptGradientClipping
from lightning_softprompt.training.best_prompts import AMONG_LABELS, BestPrompts
from lightning_softprompt.training.callback import SoftPromptCallback
from lightning_softprompt.training.distillation import PromptDistillation
from lightning_softprompt.training.launchers import check_launcher
from lightning_softprompt.training.module import CausalLMModule


class Parser(OneLine, LightningArgumentParser):
    """Lightning's parser, whose errors are one line, and which reads 1 as a whole number wherever one is taken.

    The first type of a union that fits is taken, and typing keeps the order of whoever made an equal union first: where
    that is `float | int`, a limit of 1 batch would be 1.0, which means all batches.
    """

    def add_class_arguments(self, *arguments: Any, **options: Any) -> list[str]:
        """Add the arguments of a class: the Trainer, or one that a config names."""
        added = super().add_class_arguments(*arguments, **options)
        actions: list[Any] = self._actions
        for action in actions:
            types = list(get_args(getattr(action, "_typehint", None)))
            if int in types and float in types:
                types.remove(int)
                types.insert(types.index(float), int)
                action._typehint = reduce(or_, types)  # a new union; Union[...] would give the kept one
        return added


class SoftPromptCLI(LightningCLI):
    """LightningCLI with the arguments of `SoftPromptCallback` under `prompts`.

    Unless the config says something about clipping, the gradient of each task has norm 1 in every step.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments `prompts` and `json`."""
        parser.add_lightning_class_args(SoftPromptCallback, "prompts")
        parser.add_argument("--json", type=bool, default=False, help="Print what was done as JSON, and nothing else.")

    def before_instantiate_classes(self) -> None:
        """Add clipping if the config says nothing about it. With `json`, redirect everything else to stderr."""
        check_checkpoint_argument(
            str(self.subcommand), self._get(self.config, "ckpt_path"), self._get(self.config, "weights_only")
        )
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
            trainer.callbacks = [*callbacks, Namespace(class_path=path, init_args=Namespace(method="normalized"))]

    def _parse_ckpt_path(self) -> None:
        """Take no settings out of a checkpoint: a run has those of its config.

        Lightning 2.6 would put the hyperparameters that a checkpoint holds, classes to import among them, over them.
        """

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        options = super()._prepare_subcommand_kwargs(subcommand)
        said = options.get("weights_only")
        return {**options, "weights_only": loads_weights_only(options.get("ckpt_path"), said)}

    def _run_subcommand(self, subcommand: str) -> None:
        with nullcontext() if subcommand == "fit" else quiet_callbacks():
            super()._run_subcommand(subcommand)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train. However a run ends, its prompts are left in the folder in which a complete run leaves them.

        Raises:
            SystemExit: a signal ended the run; the exit status is 130 for SIGINT and 143 for SIGTERM.
        """
        trainer: Any = self.trainer
        check_launcher(trainer)  # here it is one line; in a process that the launcher starts, it would be a traceback
        best = _best_prompts(trainer, model)
        self._log_dir: str | None = None
        self._comparison = Comparison(best)
        trainer.callbacks += [LambdaCallback(on_fit_start=self._note_log_dir), self._comparison]
        if best is not None and best not in trainer.callbacks:  # before those that save what it knows
            saving = [isinstance(callback, Checkpoint) for callback in trainer.callbacks]
            trainer.callbacks.insert(saving.index(True) if True in saving else len(saving), best)
        try:
            trainer.fit(model, **kwargs)
        except BaseException as error:  # signals, too
            status = exit_status(error)
            ended_by = {130: "SIGINT", 143: "SIGTERM"}.get(status or 1, type(error).__name__)
            if trainer.is_global_zero and self._callback.prompts and trainer.global_step > 0:
                self._leave_early(ended_by)
            elif status is not None:
                words = f"{ended_by} ended the run before its first step, so there is nothing to save"
                self._say({"prompts": None, "steps": 0, "ended_by": ended_by}, words)
            if status is not None:
                raise SystemExit(status) from error
            raise

    def _note_log_dir(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the Trainer's folder, which every rank must read: that is too late at the end of a run."""
        self._log_dir = trainer.log_dir

    def after_fit(self) -> None:
        """Leave the prompts, with a table of what each task gained.

        Raises:
            SoftPromptError: a prompt was left out, because it is not finite.
        """
        metrics = self._metrics()  # every rank must read them, as they are communicated
        if not self.trainer.is_global_zero:
            return
        left = self._leave(self._comparison.tuned(metrics["metrics"]))
        if left.table and not self._get(self.config, "json"):
            print_table("on the validation rows", left.table)
        if left.spoilt:
            self._say({**left.done, **metrics}, left.text)
            raise SoftPromptError(
                f"{left.text}. Train these again, at a lower rate or with PromptGradientClipping and CollapseGuard"
            )
        # A sharded base runs on all ranks at once, and this is the first one alone.
        if isinstance(self.model, PromptDistillation) and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            left.done["fidelity"] = beside_teachers(self.model, self.trainer.progress_bar_callback is not None)
            if left.done["fidelity"] and not self._get(self.config, "json"):
                print_fidelity(left.done["fidelity"])
        base = str(getattr(self.model, "base", "BASE"))
        left.text += how_to_serve(base, left.done["prompts"], left.done["checkpoint"])
        self._say({**left.done, **metrics}, left.text)

    @property
    def _callback(self) -> SoftPromptCallback:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(each for each in callbacks if isinstance(each, SoftPromptCallback))

    @property
    def _folder(self) -> Path:
        return Path(self._log_dir or self.trainer.default_root_dir) / "prompts"

    def _leave(self, tuned: dict[str, float]) -> Outcome:
        callback = self._callback
        assert callback.prompts is not None
        return leave_prompts(self.trainer, callback.prompts, self._folder, callback.tasks, self._comparison, tuned)

    def _leave_early(self, ended_by: str) -> None:
        left = self._leave({})
        checkpoint, words = how_to_go_on(self.trainer, self._folder, ended_by)
        self._say({**left.done, "ended_by": ended_by, "checkpoint": checkpoint}, left.text + words)

    def after_validate(self) -> None:
        """With `json`, print the metrics; without it, Lightning's table has shown them."""
        self._say(self._metrics())

    def after_test(self) -> None:
        """With `json`, print the metrics; without it, Lightning's table has shown them."""
        self._say(self._metrics())

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        """Judge trained prompts.

        Raises:
            SoftPromptError: neither a checkpoint nor trained prompts are given, or no rows.
        """
        self._check_source("test")
        if kwargs.get("ckpt_path") is None and isinstance(self._callback.tasks, Mapping):
            raise SoftPromptError(
                "test judges trained prompts, and there are none; give --ckpt_path CHECKPOINT, or "
                "--prompts.tasks FOLDER, where fit left them"
            )
        self.trainer.test(model, **kwargs)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write the rows with their tasks and answers to `predictions.jsonl`, one JSON line per row.

        Raises:
            SoftPromptError: there is no source; or, after everything is written, a row has no answer.
        """
        self._check_source("predict")
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

    def _check_source(self, split: str) -> None:
        """Find a source that is missing before the model is loaded. A class of somebody's own may have its own rows."""
        if type(self.datamodule) is TaskDataModule and not self.datamodule.sources[split]:
            raise no_source(split)

    def _metrics(self) -> dict[str, dict[str, float]]:
        return {"metrics": {name: float(value) for name, value in self.trainer.callback_metrics.items()}}

    def _say(self, done: dict[str, Any], text: str | None = None) -> None:
        as_json = self._get(self.config, "json")
        if self.trainer.is_global_zero and (as_json or text is not None):
            say(done, as_json, text or "", self._stdout)


def _best_prompts(trainer: Any, model: LightningModule) -> BestPrompts | None:
    """The Trainer's `BestPrompts`, or new ones.

    None where a checkpoint is to say which prompts are the best, or an average at the end of the run, and for modules
    whose metrics are not known.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, BestPrompts):
            return callback
        if isinstance(callback, StochasticWeightAveraging) or (
            isinstance(callback, ModelCheckpoint) and callback.monitor is not None
        ):
            return None
    if isinstance(model, PromptDistillation):
        return BestPrompts({"val/divergence": "min"})
    if isinstance(model, CausalLMModule):
        return BestPrompts(AMONG_LABELS if model.objective == "labels" else None)
    return None


def run(arguments: list[str]) -> None:
    """Run the command line of one of the Trainer's commands.

    Raises:
        SoftPromptError: settings with which Lightning cannot run, such as devices that do not exist.
    """
    try:
        # The first restores stdout, which before_instantiate_classes may change.
        with redirect_stdout(sys.stdout), quiet_loggers():
            SoftPromptCLI(
                CausalLMModule,
                TaskDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                parser_kwargs={"prog": "lightning-softprompt"},
                args=arguments,
            )
    except MisconfigurationException as error:
        raise SoftPromptError(str(error)) from error
    except UnpicklingError as error:
        raise SoftPromptError(
            "the checkpoint holds objects that could run code when they are loaded, or is none; give one that fit told"
        ) from error

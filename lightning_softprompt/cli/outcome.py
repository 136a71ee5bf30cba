"""What a run of `fit` leaves: the prompts in a folder, and words about them and about what comes next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_softprompt.attachment.attachment import SUBMODULE
from lightning_softprompt.cli.comparison import KEY, Comparison, Metrics
from lightning_softprompt.prompts.soft_prompts import SoftPrompts


@dataclass
class Outcome:
    """What a run left.

    Attributes:
        done: the same as JSON.
        text: the same in words.
        table: what each task gained, where validation rows tell.
        spoilt: the tasks whose prompts are not finite, and were left out.
    """

    done: dict[str, Any]
    text: str
    table: list[dict[str, Any]]
    spoilt: list[str]


def leave_prompts(
    trainer: Any, prompts: SoftPrompts, folder: Path, starts: Any, comparison: Comparison, tuned: Metrics
) -> Outcome:
    """Save the prompts: the best ones, if a checkpoint callback monitors a metric and no `BestPrompts` does.

    Prompts that are not finite are left out, so that the others are not lost with them.

    Args:
        trainer: whose run has ended.
        prompts: its prompts.
        folder: where to save them.
        starts: how each task's prompt started.
        comparison: what was measured before the run.
        tuned: the metrics at the end of the run; those of the best prompts stand in their checkpoint.
    """
    saving = next(iter(_savings(trainer)), None)
    best = {}
    if saving is not None and saving.monitor and comparison.best is None:
        score = saving.best_model_score
        best = {"monitor": saving.monitor, "best": None if score is None else float(score)}
        tuned = _load_best(prompts, Path(saving.best_model_path)) or tuned
    spoilt = [task for task in prompts if not bool(prompts[task].isfinite().all())]
    left_out = {*spoilt, *prompts.teachers}
    kept = prompts.subset(task for task in prompts if task not in left_out) if left_out else prompts
    if len(kept):
        kept.save_pretrained(folder)
    table = comparison.table(starts if isinstance(starts, Mapping) else {}, tuned, kept.tasks)
    done = {"prompts": str(folder) if len(kept) else None, "tasks": list(kept.tasks), "steps": trainer.global_step}
    done |= ({"not_finite": spoilt} if spoilt else {}) | best | {"checkpoint": named_checkpoint(trainer)}
    text = f"prompts saved in {folder}" if len(kept) else "no prompts saved"
    if spoilt:
        text += f", without {', '.join(map(repr, spoilt))}: they hold NaN or Inf"
    return Outcome(done | {"results": table}, text, table, spoilt)


def exit_status(error: BaseException) -> int | None:
    """The exit status of a run that a signal ended, by the error that came of it; None where it was none.

    Lightning 2.6 exits with 1 where SIGINT interrupts a run, and with 0 where SIGTERM does.
    """
    if isinstance(error, SIGTERMException):
        return 143
    return 130 if isinstance(error.__context__, KeyboardInterrupt) else None


def how_to_go_on(trainer: Any, folder: Path, ended_by: str) -> tuple[str | None, str]:
    """The checkpoint from which a run that `ended_by` ended goes on, and what to do, in words."""
    checkpoint = newest_checkpoint(trainer)
    option = f"--ckpt_path {checkpoint}" if checkpoint else f"--prompts.tasks {folder}"
    ended = f"{ended_by} ended the run after {trainer.global_step} steps"
    return checkpoint, f"; {ended}. To go on, run the same command with {option}"


def how_to_serve(base: str, folder: str, checkpoint: str | None) -> str:
    """Where the checkpoint is, and the command that serves the prompts."""
    where = f"\ncheckpoint: {checkpoint}" if checkpoint else ""
    command = f"lightning-softprompt serve --base {shlex.quote(base)} --prompts {shlex.quote(folder)}"
    return f"{where}\nto serve them: {command}"


def named_checkpoint(trainer: Any) -> str | None:
    """The checkpoint that a complete run names: the best one, or the last one if there is no best one."""
    return next((each.best_model_path or each.last_model_path or None for each in _savings(trainer)), None)


def newest_checkpoint(trainer: Any) -> str | None:
    """The checkpoint from which an interrupted run goes on; None if there is none."""
    paths = [each.ckpt_path for each in trainer.checkpoint_callbacks if isinstance(each, OnExceptionCheckpoint)]
    for each in _savings(trainer):
        paths += [each.last_model_path, each.best_model_path, *each.best_k_models]
    return max(filter(os.path.exists, paths), key=os.path.getmtime, default=None)


def _savings(trainer: Any) -> list[ModelCheckpoint]:
    """The Trainer's `ModelCheckpoint`s, those that monitor a metric first."""
    found = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return sorted(found, key=lambda each: each.monitor is None)


def _load_best(prompts: SoftPrompts, path: Path) -> Metrics:
    """Give the prompts the values of the best checkpoint, and return its metrics."""
    if not path.is_file():  # FSDP2 saves a folder of parts instead
        return {}
    checkpoint = torch.load(path, weights_only=True)
    marker = f".{SUBMODULE}."
    prompts.load_state_dict({k.split(marker)[1]: v for k, v in checkpoint["state_dict"].items() if marker in k})
    return checkpoint.get(KEY, {}).get("tuned", {})

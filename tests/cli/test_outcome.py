"""What a run leaves, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_softprompt import SoftPrompts
from lightning_softprompt.cli.comparison import KEY, Comparison
from lightning_softprompt.cli.outcome import exit_status, how_to_go_on, how_to_serve, leave_prompts


def two_prompts() -> SoftPrompts:
    prompts = SoftPrompts(4)
    prompts.add("good", torch.ones(2, 4))
    prompts.add("spoilt", torch.ones(3, 4))
    return prompts


def trainer(*savings: ModelCheckpoint) -> Any:
    return SimpleNamespace(checkpoint_callbacks=list(savings), global_step=7)


@pytest.fixture
def best(tmp_path: Path) -> ModelCheckpoint:
    """A checkpoint of better prompts than those at the end of the run."""
    saving = ModelCheckpoint(monitor="val/loss")
    saving.best_model_path, saving.best_model_score = str(tmp_path / "best.ckpt"), torch.tensor(0.5)
    state = {f"model.soft_prompts.{name}": value * 2 for name, value in two_prompts().state_dict().items()}
    torch.save({"state_dict": state, KEY: {"tuned": {"loss/good": 0.5, "loss/spoilt": 0.25}}}, saving.best_model_path)
    return saving


def test_the_best_prompts_are_saved_and_judged_by_their_own_metrics(best: ModelCheckpoint, tmp_path: Path) -> None:
    comparison = Comparison()
    comparison.before = {"no prompt": {"loss/good": 2.0}, "start": {"loss/good": 1.0, "loss/spoilt": 3.0}}
    starts = {"good": "is it good?", "spoilt": 3}
    left = leave_prompts(trainer(best), two_prompts(), tmp_path / "out", starts, comparison, {"loss/good": 9.0})
    assert torch.equal(SoftPrompts.from_pretrained(tmp_path / "out")["good"], torch.full((2, 4), 2.0))
    assert left.table == [
        {"task": "good", "measured": "loss", "no prompt": 2.0, "start": None, "hard prompt": 1.0, "tuned": 0.5},
        {"task": "spoilt", "measured": "loss", "no prompt": None, "start": 3.0, "hard prompt": None, "tuned": 0.25},
    ]
    assert left.done == {
        **{"prompts": str(tmp_path / "out"), "tasks": ["good", "spoilt"], "steps": 7, "results": left.table},
        **{"monitor": "val/loss", "best": 0.5, "checkpoint": best.best_model_path},
    }


def test_without_a_monitored_metric_the_last_prompts_are_left(tmp_path: Path) -> None:
    tuned = {"accuracy/good": 0.5, "loss/good": 9.0}
    left = leave_prompts(trainer(), two_prompts(), tmp_path / "out", str(tmp_path), Comparison(), tuned)
    assert torch.equal(SoftPrompts.from_pretrained(tmp_path / "out")["good"], torch.ones(2, 4))
    assert left.table == [{"task": "good", "measured": "accuracy, %", "tuned": 50.0}] and left.spoilt == []
    assert left.done["checkpoint"] is None


def test_a_prompt_that_is_not_finite_costs_the_others_nothing(tmp_path: Path) -> None:
    prompts = two_prompts()
    prompts["spoilt"].data[0, 0] = float("nan")
    left = leave_prompts(trainer(), prompts, tmp_path / "out", {}, Comparison(), {})
    assert SoftPrompts.from_pretrained(tmp_path / "out").tasks == ("good",)
    assert left.done["not_finite"] == left.spoilt == ["spoilt"] and "without 'spoilt': they hold NaN" in left.text
    prompts["good"].data[0, 0] = float("inf")
    left = leave_prompts(trainer(), prompts, tmp_path / "none", {}, Comparison(), {})
    assert (
        left.done["prompts"] is None and left.text.startswith("no prompts saved") and not (tmp_path / "none").exists()
    )


def test_what_comes_next(best: ModelCheckpoint, tmp_path: Path) -> None:
    checkpoint, words = how_to_go_on(trainer(best), tmp_path / "out", "SIGINT")
    assert checkpoint == best.best_model_path
    assert (
        words == f"; SIGINT ended the run after 7 steps. To go on, run the same command with --ckpt_path {checkpoint}"
    )
    assert how_to_go_on(trainer(), tmp_path / "out", "SIGINT")[1].endswith(f"--prompts.tasks {tmp_path / 'out'}")
    assert how_to_serve("my base", "out", "a.ckpt") == (
        "\ncheckpoint: a.ckpt\nto serve them: lightning-softprompt serve --base 'my base' --prompts out"
    )


def test_a_teacher_that_a_run_left_behind_is_not_saved(tmp_path: Path) -> None:
    prompts = two_prompts()
    prompts.add("hard", torch.ones(2, 4), teacher=True)
    left = leave_prompts(trainer(), prompts, tmp_path / "out", {}, Comparison(), {})
    assert left.done["tasks"] == ["good", "spoilt"] == list(SoftPrompts.from_pretrained(tmp_path / "out").tasks)


def test_signals_have_exit_statuses() -> None:
    interrupted = SystemExit(1)
    interrupted.__context__ = KeyboardInterrupt()
    found = [exit_status(error) for error in (SIGTERMException(), interrupted, SystemExit(1), ValueError())]
    assert found == [143, 130, None, None]

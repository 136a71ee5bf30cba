"""Runs of `fit` that a signal, an exception, a limit or a spoilt prompt ends: what they leave, say, and exit with."""

from __future__ import annotations

import builtins
import json
import os
import signal
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_softprompt import SoftPrompts, cli
from tests.cli.command_line import ROOT, overrides, run


class Ends(Callback):
    """Ends the run after a step, or before the first one, and keeps in `values` the prompts as they were there."""

    values: ClassVar[dict[str, torch.Tensor]] = {}

    def __init__(self, how: str, step: int = 2, spoil: str | None = None) -> None:
        self.how, self.step, self.spoil = how, step, spoil

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.step == 0:
            raise getattr(builtins, self.how)("it ends here")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            prompts = pl_module.model.soft_prompts
            if self.spoil:
                prompts[self.spoil].data[0, 0] = torch.nan
            Ends.values = {task: prompts[task].detach().clone() for task in prompts}
            if self.how == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            elif self.how != "nothing":
                raise getattr(builtins, self.how)("it ends here")


def ended(tiny_base, tmp_path, how: str, *more: str, alone: bool = False) -> list[str]:
    """The arguments of a run that ends early; `alone` leaves the other callbacks out, and with them all checkpoints."""
    without = ["--trainer.callbacks=null", "--trainer.enable_checkpointing=false"] if alone else []
    ends = [*without, "--trainer.callbacks+=tests.integration.test_ended_runs.Ends", f"--trainer.callbacks.how={how}"]
    return ["fit", "--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), *ends, *more]


@pytest.mark.parametrize(("how", "status"), [("KeyboardInterrupt", 130), ("RuntimeError", 1), ("FileNotFoundError", 1)])
def test_a_run_that_ends_early_leaves_its_prompts(how, status, tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, RuntimeError)) as end:
        cli.main(ended(tiny_base, tmp_path, how, alone=True))
    assert status == 1 if how == "RuntimeError" else end.value.code == status  # a traceback is status 1, too
    said = capsys.readouterr().out
    name = "SIGINT" if status == 130 else how
    assert f"prompts saved in {tmp_path / 'prompts'}; {name} ended the run after 2 steps" in said
    assert f"with --prompts.tasks {tmp_path / 'prompts'}" in said
    prompts = SoftPrompts.from_pretrained(tmp_path / "prompts")
    assert all(torch.equal(prompts[task], Ends.values[task]) for task in ("sentiment", "source"))
    validated = overrides(tiny_base, tmp_path), f"--prompts.tasks={tmp_path / 'prompts'}"
    cli.main(["validate", "--config=examples/mixed_tasks.yaml", *validated[0], validated[1]])


def test_a_run_that_ends_before_its_first_step_says_so(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        cli.main(ended(tiny_base, tmp_path, "KeyboardInterrupt", "--trainer.callbacks.step=0", alone=True))
    assert end.value.code == 130 and not (tmp_path / "prompts").exists()
    assert "SIGINT ended the run before its first step, so there is nothing to save" in capsys.readouterr().out


def test_sigterm_ends_a_run_with_its_own_status(tiny_base, tmp_path) -> None:
    done = run(*ended(tiny_base, tmp_path, "SIGTERM", "--json"), check=False)
    assert done.returncode == 143 and "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    assert told["ended_by"] == "SIGTERM" and told["steps"] == 2 and told["tasks"] == ["sentiment", "source"]
    assert SoftPrompts.from_pretrained(told["prompts"]).tasks == ("sentiment", "source")


def test_a_run_that_ends_early_leaves_the_best_prompts_and_names_the_newest_checkpoint(
    tiny_base, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(ROOT)
    more = ["--trainer.callbacks.step=5", "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    more += ["--trainer.callbacks.every_n_train_steps=4", f"--trainer.callbacks.dirpath={tmp_path / 'more'}"]
    with pytest.raises(SystemExit) as end:
        cli.main([*ended(tiny_base, tmp_path, "KeyboardInterrupt", *more), "--json"])
    done = json.loads(capsys.readouterr().out)
    assert end.value.code == 130 and done["ended_by"] == "SIGINT" and done["monitor"] == "val/accuracy"
    assert torch.load(done["checkpoint"], weights_only=True)["global_step"] == 4
    (best,) = (path for path in tmp_path.rglob("*.ckpt") if str(path) != done["checkpoint"])
    prompts, expected = SoftPrompts.from_pretrained(done["prompts"]), SoftPrompts.from_checkpoint(best)
    for task in prompts:
        assert torch.equal(prompts[task], expected[task]) and not torch.equal(prompts[task], Ends.values[task])


def test_a_run_that_ends_before_a_step_leaves_nothing(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        cli.main([*ended(tiny_base, tmp_path, "nothing"), "--prompts.tasks={sentiment: 3}"])
    assert end.value.code == 1 and not (tmp_path / "prompts").exists()
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: the data have rows of tasks without")


def test_a_time_limit_ends_a_run_well(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    cli.main([*ended(tiny_base, tmp_path, "nothing", "--trainer.max_time=00:00:00:00"), "--json"])
    done = json.loads(capsys.readouterr().out)
    assert done["steps"] < 6 and "ended_by" not in done and len(SoftPrompts.from_pretrained(done["prompts"])) == 2


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")  # torchmetrics, of the validation
@pytest.mark.parametrize("how", ["nothing", "KeyboardInterrupt"])
def test_a_prompt_that_is_not_finite_costs_no_other_one(how: str, tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    last = ["--trainer.callbacks.step=6", "--trainer.callbacks.spoil=source", "--trainer.limit_val_batches=0"]
    with pytest.raises(SystemExit) as end:
        cli.main([*ended(tiny_base, tmp_path, how, *last, alone=True), "--json"])
    printed = capsys.readouterr()
    done = json.loads(printed.out)
    assert end.value.code == (1 if how == "nothing" else 130)
    assert done["tasks"] == ["sentiment"] and done["not_finite"] == ["source"]
    if how == "nothing":
        said = printed.err.strip().splitlines()[-1]
        assert said.startswith("error: prompts saved in") and "without 'source': they hold NaN or Inf" in said
    prompts = SoftPrompts.from_pretrained(tmp_path / "prompts")
    assert prompts.tasks == ("sentiment",) and torch.equal(prompts["sentiment"], Ends.values["sentiment"])


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")  # torchmetrics, of the validation
def test_with_validation_rows_a_prompt_that_ends_not_finite_is_the_best_one(
    tiny_base, tmp_path, capsys, monkeypatch, caplog
) -> None:
    monkeypatch.chdir(ROOT)
    last = ["--trainer.callbacks.step=6", "--trainer.callbacks.spoil=source"]
    cli.main([*ended(tiny_base, tmp_path, "nothing", *last, alone=True), "--json"])
    done = json.loads(capsys.readouterr().out)
    assert sorted(done["tasks"]) == ["sentiment", "source"] and "not_finite" not in done
    prompts = SoftPrompts.from_pretrained(tmp_path / "prompts")
    assert all(bool(prompts[task].isfinite().all()) for task in prompts)
    assert "the prompt of task 'source' ended with numbers that are not finite" in caplog.text


def test_a_strategy_that_loses_the_prompts_is_one_line(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    strategy = ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"]
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), *strategy])
    assert end.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: DDPStrategy with start method 'spawn'")

"""`PromptGradientNorm`: what it logs is what happened, and on other steps it measures nothing."""

from __future__ import annotations

import csv
import math
from typing import ClassVar

import pytest
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_softprompt import (
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPromptError,
)
from tests.gradients.recorded_runs import Weighted, norm_of, run
from tests.modules import TASKS, loader, trainer


@pytest.mark.parametrize("clipping", ["ours", "lightning", "none"])
def test_what_is_logged_is_what_happened(clipping: str, tmp_path) -> None:
    callbacks = [PromptGradientClipping(1e-2)] if clipping == "ours" else []
    options = {"gradient_clip_val": 1e-2} if clipping == "lightning" else {}
    logger, monitor = CSVLogger(tmp_path), PromptGradientNorm()
    recorder = run(tmp_path, Weighted(), monitor, *callbacks, logger=logger, log_every_n_steps=2, **options)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["grad_norm/total"]]
    assert [int(row["step"]) for row in rows] == [1, 3]
    for row in rows:
        step = int(row["step"])
        gradients = recorder.gradients[step]
        for task in TASKS:
            start = recorder.start[step][task]
            update = norm_of(recorder.end[step][task] - start)
            expected = {
                f"grad_norm/{task}": norm_of(gradients[task]),
                f"grad_norm_clipped/{task}": norm_of(recorder.clipped[step][task]),
                f"prompt_norm/{task}": norm_of(start),
                f"update_ratio/{task}": update / norm_of(start),
            }
            for name, value in expected.items():
                assert float(row[name]) == pytest.approx(value, rel=1e-4), name
            assert (norm_of(recorder.clipped[step][task]) < 0.9 * norm_of(gradients[task])) == (clipping != "none")
            for name in ("token_similarity", "effective_rank", "vocabulary_distance"):
                assert math.isfinite(float(row[f"{name}/{task}"]))
        assert float(row["grad_norm/total"]) == pytest.approx(norm_of(*gradients.values()), rel=1e-4)
        assert -1 <= float(row["task_similarity"]) <= 1
    assert [step for step, _ in monitor.history["grad_norm/alpha"]] == [1, 3]


def test_tasks_without_rows_are_not_logged_and_the_worst_is_on_the_bar(tmp_path) -> None:
    class Bar(TQDMProgressBar):
        seen: ClassVar[list[str]] = []

        def on_train_batch_end(self, trainer, *arguments):
            super().on_train_batch_end(trainer, *arguments)
            self.seen.append(self.get_metrics(trainer, arguments[0]).get("grad_norm"))

    monitor, bar = PromptGradientNorm(every_n_steps=1), Bar()
    prompts = SoftPromptCallback(dict(TASKS))
    module = Weighted(always={"gamma": 100.0})
    trainer(tmp_path, monitor, prompts, bar, enable_progress_bar=True).fit(module, loader(12, tasks=(0, 2)))
    assert "grad_norm/beta" not in monitor.history and len(monitor.history["grad_norm/gamma"]) == 3
    assert all(text.startswith("gamma ") for text in bar.seen)


def test_nothing_is_measured_on_other_steps(tmp_path, monkeypatch) -> None:
    asked = []
    tolist = Tensor.tolist
    monitor = PromptGradientNorm(every_n_steps=4)

    class Asked(Callback):
        place = -2

        def on_before_optimizer_step(self, *arguments):
            monkeypatch.setattr(Tensor, "tolist", lambda tensor: asked.append(1) or tolist(tensor))
            for name in ("item", "__float__", "__bool__"):
                original = getattr(Tensor, name)
                monkeypatch.setattr(Tensor, name, lambda tensor, f=original: asked.append(1) or f(tensor))

        def on_train_batch_end(self, trainer, *arguments):
            monkeypatch.undo()

    # The optimizer's own questions come with the run without the monitor.
    counts = []
    for callbacks in ([], [monitor]):
        asked.clear()
        run(tmp_path, Weighted(), Asked(), *callbacks, count=18)
        counts.append(len(asked))
    assert counts[0] == counts[1]


def test_a_task_named_total_is_refused_by_the_monitor(tmp_path) -> None:
    with pytest.raises(SoftPromptError, match="rename it"):
        trainer(tmp_path, SoftPromptCallback({"total": 2}), PromptGradientNorm()).fit(Weighted(), loader(4, tasks=(0,)))


def test_updates_of_a_task_that_was_put_back_are_those_taken(tmp_path) -> None:
    weights = {(step, "gamma"): 5.0 for step in range(12, 400)}
    guard, monitor = CollapseGuard(snapshot_every_n_steps=4, on_spike="warn"), PromptGradientNorm(1)
    recorder = run(tmp_path, Weighted(weights), guard, monitor, count=6 * 26)
    step = next(event.step for event in guard.events if event.seen == "collapse") + 1
    start, end = recorder.start[step]["gamma"], recorder.end[step]["gamma"]
    assert dict(monitor.history["update_ratio/gamma"])[step] == pytest.approx(
        norm_of(end - start) / norm_of(start), rel=1e-4
    )

"""`PromptGradientNorm`: what it logs is what happened, and on other steps it measures nothing."""

from __future__ import annotations

import csv
import itertools
import math
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_softprompt import (
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPromptError,
    SoftPrompts,
)
from lightning_softprompt.gradients import norms
from tests.gradients.recorded_runs import Weighted, norm_of, run
from tests.modules import TASKS, Rows, loader, trainer


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


@pytest.mark.parametrize("has_logger", [False, True])
def test_callbacks_can_monitor_every_name(has_logger: bool, tmp_path) -> None:
    monitor = PromptGradientNorm(every_n_steps=1)
    saving = ModelCheckpoint(tmp_path, "{step}", "grad_norm/gamma", mode="max", every_n_train_steps=1)
    stopping = EarlyStopping("grad_norm/total", min_delta=1e9, patience=1, check_on_train_epoch_end=True)
    logger = CSVLogger(tmp_path) if has_logger else False
    options = dict(logger=logger, enable_checkpointing=True, max_epochs=3)
    recorder = run(tmp_path, Weighted({(1, "gamma"): 5.0}), saving, stopping, monitor, **options)
    assert len(recorder.end) == 8  # nothing is better by so much, so that the second epoch of three is the last one
    assert float(stopping.best_score) == pytest.approx(norm_of(*recorder.gradients[3].values()), rel=1e-4)
    assert saving.best_model_path.endswith("step=2.ckpt")  # two steps were taken
    assert float(saving.best_model_score) == pytest.approx(norm_of(recorder.gradients[1]["gamma"]), rel=1e-4)


def test_what_is_monitored_is_the_newest_value_on_the_cpu(tmp_path) -> None:
    class Watching(Callback):
        def on_train_batch_end(self, trainer, *arguments) -> None:
            metrics = {name: trainer.callback_metrics[name] for name in monitor.history}
            assert all(metric.shape == () and metric.device.type == "cpu" for metric in metrics.values())
            newest = {name: points[-1][1] for name, points in monitor.history.items()}
            assert {name: float(metric) for name, metric in metrics.items()} == pytest.approx(newest, nan_ok=True)
            seen.append(len(metrics))

    monitor, seen = PromptGradientNorm(every_n_steps=2), []
    run(tmp_path, Weighted({(3, "beta"): math.nan}), monitor, Watching())
    assert seen == [0, 23, 23, 23]


def test_a_step_that_is_logged_waits_for_the_device_once(tmp_path, monkeypatch) -> None:
    """Besides, the progress bar is asked for once, and has the module's loss on it."""

    class Counting(PromptGradientNorm):
        def on_train_batch_end(self, *arguments) -> None:
            with monkeypatch.context() as patch:
                for name in ("tolist", "item", "__float__", "__bool__", "cpu", "numpy"):
                    original = getattr(Tensor, name)
                    patch.setattr(Tensor, name, lambda t, n=name, f=original: waits.append(n) or f(t))
                super().on_train_batch_end(*arguments)

    class Shown(Weighted):
        def training_step(self, batch, batch_idx) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True)
            return loss

    waits: list[str] = []
    run(tmp_path, Shown(), Counting(every_n_steps=2))
    assert waits == ["tolist", "item"] * 2


def run_of_equal_batches(folder, steps: int, checkpoint: str | None = None, every: int = 5) -> PromptGradientNorm:
    """Epochs of nine equal batches, so that a plain loader resumes exactly."""
    torch.manual_seed(0)
    rows = Rows(6)
    rows.rows *= 9
    batches = torch.utils.data.DataLoader(rows, batch_size=6, collate_fn=rows.collate)
    monitor, stopping = PromptGradientNorm(every), EarlyStopping("grad_norm/total", patience=99)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = dict(max_epochs=-1, max_steps=steps, enable_checkpointing=True)
    this = trainer(folder, SoftPromptCallback(dict(TASKS)), monitor, stopping, saving, **options)
    this.fit(Weighted(), batches, ckpt_path=checkpoint, weights_only=True)
    return monitor


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("every, stopped", [(5, 4), (5, 5), (5, 6), (5, 8), (1, 30)])
def test_a_resumed_run_logs_and_monitors_as_the_whole_run_does(every: int, stopped: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(norms, "MOST_POINTS", 6)
    whole = run_of_equal_batches(tmp_path, 40, every=every)
    resumed = run_of_equal_batches(tmp_path / "on", 40, str(tmp_path / f"step={stopped}.ckpt"), every)
    assert resumed.history == whole.history and resumed.state_dict() == whole.state_dict()
    for kept in (stopped + 1, 40):
        one, other = (
            torch.load(folder / f"step={kept}.ckpt", weights_only=True)["callbacks"]
            for folder in (tmp_path, tmp_path / "on")
        )
        (name,) = [name for name in one if name.startswith("EarlyStopping")]
        assert one[name] == other[name], kept


def test_the_history_of_another_run_is_monitored_by_no_one(tmp_path) -> None:
    monitor, seen = PromptGradientNorm(every_n_steps=3), []
    prompts = SoftPromptCallback(SoftPrompts.for_model(Weighted().model, TASKS))

    class Watching(Callback):
        def on_train_batch_end(self, trainer, *arguments) -> None:
            seen.append("grad_norm/total" in trainer.callback_metrics)

    for _ in range(2):
        trainer(tmp_path, prompts, monitor, Watching()).fit(Weighted(), loader(24, 6))
    assert seen == [False, False, True, True] * 2
    assert [step for step, _ in monitor.history["grad_norm/total"]] == [2, 2]


def test_the_history_of_a_million_steps_is_a_thousand_points_from_start_to_end() -> None:
    points: list[tuple[int, float]] = []
    longest = 0
    for step in range(1_000_000):
        norms.remember(points, step, float(step))
        longest = max(longest, len(points))
        assert step >= 1000 or len(points) == step + 1
    assert longest == 1000
    steps = [step for step, _ in points]
    assert steps[0] == 0 and steps[-1] == 999_999 and points[-1] == (999_999, 999_999.0)
    assert max(later - earlier for earlier, later in itertools.pairwise(steps)) <= 2048


def test_lists_of_nearly_the_same_steps_keep_nearly_the_same_ones() -> None:
    """Norms before and after clipping are compared step by step; the latter lack steps that a scaler has skipped."""
    before, after = [], []
    skipped = (1280, 5010)
    for step in range(0, 40_000, 10):
        norms.remember(before, step, 1.0)
        if step not in skipped:
            norms.remember(after, step, 2.0)
    firsts = [-(-start // 10) * 10 for start in range(0, 30_000, 128)]
    assert [step for step, _ in before if step < 30_000] == firsts and 1280 in firsts
    assert [step for step, _ in after if step < 30_000] == [1290 if step == 1280 else step for step in firsts]

"""The gradient callbacks in a Trainer: measured, clipped and guarded against oracles that know nothing of them."""

from __future__ import annotations

import copy
import csv
import itertools
import logging
import math
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional

from lightning_softprompt import (
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPromptError,
    SoftPrompts,
)
from lightning_softprompt.gradients.limits import AutoClip, ZClip
from lightning_softprompt.gradients.snapshots import Snapshot, Snapshots
from tests import modules, tiny
from tests.modules import TASKS, loader, trainer

NAMES = list(TASKS)


class Weighted(modules.Plain):
    """Each row's loss times a weight of its step and task, or of its task alone: not a number, or a thousand.

    It logs the loss of each task, as `CausalLMModule` does.
    """

    def __init__(
        self,
        weights: dict[tuple[int, str], float] | None = None,
        always: dict[str, float] | None = None,
        optimizer: type = torch.optim.AdamW,
    ) -> None:
        super().__init__(learning_rate=0.01)
        self.weights = weights or {}
        self.always = always or {}
        self.optimizer = optimizer

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
        ).mean(1)
        tasks = [NAMES[task] for task in batch["task_ids"].tolist()]
        weights = [self.weights.get((self.global_step, task), 1.0) * self.always.get(task, 1.0) for task in tasks]
        losses = losses * torch.tensor(weights)
        for task in set(tasks):
            self.log(f"train/loss/{task}", losses[[task == other for other in tasks]].mean().detach())
        return losses.mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=self.learning_rate)


class Silent(Weighted):
    """Logs nothing: all that is known is the loss of the batch."""

    def log(self, *arguments: Any, **options: Any) -> None:
        pass


class Recorder(Callback):
    """Prompts, gradients and moments around every step, taken at hooks that no stage uses."""

    def __init__(self) -> None:
        self.start: list[dict[str, Tensor]] = []
        self.end: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.clipped: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Any]] = []

    def prompts(self, pl_module) -> dict[str, nn.Parameter]:
        return {task: pl_module.model.soft_prompts[task] for task in TASKS}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.start.append(modules.snapshot(self.prompts(pl_module)))

    def on_after_backward(self, trainer, pl_module) -> None:
        self.gradients.append(self._gradients(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.end.append(modules.snapshot(self.prompts(pl_module)))
        self.clipped.append(self._gradients(pl_module))
        state = trainer.optimizers[0].state
        self.moments.append({task: copy.deepcopy(state.get(p, {})) for task, p in self.prompts(pl_module).items()})

    def _gradients(self, pl_module) -> dict[str, Tensor]:
        return {task: p.grad.clone() for task, p in self.prompts(pl_module).items() if p.grad is not None}


def run(folder, module, *callbacks, count: int = 24, batch_size: int = 6, **options) -> Recorder:
    torch.manual_seed(0)
    recorder = Recorder()
    prompts = SoftPromptCallback(dict(TASKS))
    trainer(folder, prompts, *callbacks, recorder, **options).fit(module, loader(count, batch_size))
    return recorder


def gradients_of(seed: int = 0) -> dict[str, nn.Parameter]:
    """Prompts with gradients of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    prompts = {}
    for task, (length, size) in {"small": (3, 1e-3), "large": (5, 100.0), "middle": (1, 1.0)}.items():
        prompts[task] = nn.Parameter(torch.randn(length, 8, generator=draw))
        prompts[task].grad = size * torch.randn(length, 8, generator=draw)
    return prompts


def norm_of(*tensors: Tensor) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("scope", ["task", "global", "token"])
def test_norms_are_clipped_as_torch_clips_them(scope: str) -> None:
    prompts, expected = gradients_of(), gradients_of()
    PromptGradientClipping(0.5, scope=scope).clip(prompts)
    if scope == "global":
        nn.utils.clip_grad_norm_(expected.values(), 0.5)
    for task, prompt in expected.items():
        if scope == "task":
            nn.utils.clip_grad_norm_([prompt], 0.5)
        elif scope == "token":
            for row in prompt.grad:
                row.mul_(min(1.0, 0.5 / (norm_of(row) + 1e-6)))
        torch.testing.assert_close(prompts[task].grad, prompt.grad, rtol=1e-5, atol=1e-9)


def test_values_are_clipped_as_torch_clips_them() -> None:
    prompts, expected = gradients_of(), gradients_of()
    PromptGradientClipping(0.5, method="value").clip(prompts)
    nn.utils.clip_grad_value_(expected.values(), 0.5)
    for task in prompts:
        assert torch.equal(prompts[task].grad, expected[task].grad)


@pytest.mark.parametrize("scope", ["task", "token"])
def test_agc_keeps_gradients_to_a_hundredth_of_the_weights(scope: str) -> None:
    prompts = gradients_of()
    with torch.no_grad():
        prompts["middle"].zero_()  # the least weight norm, 1e-3
    before = {task: prompt.grad.clone() for task, prompt in prompts.items()}
    PromptGradientClipping(method="agc", scope=scope).clip(prompts)
    for task, prompt in prompts.items():
        units = [...] if scope == "task" else range(len(prompt))
        for unit in units:
            weight, gradient = max(norm_of(prompt.detach()[unit]), 1e-3), before[task][unit]
            factor = min(1.0, 0.01 * weight / norm_of(gradient))
            torch.testing.assert_close(prompt.grad[unit], gradient * factor, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("scope", ["task", "global", "token"])
@pytest.mark.parametrize("method, history", [("percentile", AutoClip), ("zscore", ZClip)])
def test_histories_limit_each_norm_by_itself(method: str, history: type, scope: str) -> None:
    clipping, oracles = PromptGradientClipping(1e9, method=method, scope=scope), {}
    for step in range(40):
        prompts = gradients_of(step)
        before = {task: prompt.grad.clone() for task, prompt in prompts.items()}
        clipping.clip(prompts)
        if scope == "global":
            limit = oracles.setdefault("", history()).next(norm_of(*before.values()))
            factors = {task: min(1.0, limit / norm_of(*before.values())) for task in before}
        for task, gradient in before.items():
            if scope == "token":
                for index, row in enumerate(gradient):
                    limit = oracles.setdefault((task, index), history()).next(norm_of(row))
                    expected = row * min(1.0, limit / norm_of(row))
                    torch.testing.assert_close(prompts[task].grad[index], expected, rtol=2e-3, atol=1e-7)
                continue
            if scope == "task":
                limit = oracles.setdefault(task, history()).next(norm_of(gradient))
                factors = {task: min(1.0, limit / norm_of(gradient))}
            torch.testing.assert_close(prompts[task].grad, gradient * factors[task], rtol=2e-3, atol=1e-7)
    again = PromptGradientClipping(1e9, method=method, scope=scope)
    again.load_state_dict(copy.deepcopy(clipping.state_dict()))
    one, other = gradients_of(99), gradients_of(99)
    clipping.clip(one)
    again.clip(other)
    assert all(torch.equal(one[task].grad, other[task].grad) for task in one)


@pytest.mark.parametrize("scope", ["task", "global", "token"])
@pytest.mark.parametrize("method", ["norm", "value", "percentile", "zscore", "agc"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_with_its_task_and_out_of_the_statistics(bad: float, method: str, scope: str) -> None:
    clipping, without = (PromptGradientClipping(0.5, method=method, scope=scope) for _ in range(2))
    for step in range(30):
        prompts, others = gradients_of(step), gradients_of(step)
        del others["large"]
        prompts["large"].grad[0, 0] = bad
        if scope == "token":  # its other tokens are finite, and count
            others["large"] = gradients_of(step)["large"]
            others["large"].grad[0] = 0
        clipping.clip(prompts)
        without.clip(others)
    for task in ("small", "middle"):
        torch.testing.assert_close(prompts[task].grad, others[task].grad)
    if method != "value":
        assert not torch.isfinite(prompts["large"].grad).all()
    if scope != "token":
        assert clipping.state_dict() == without.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_task_is_clipped_before_the_step(accumulate: int, tmp_path) -> None:
    recorder = run(tmp_path, Weighted(), PromptGradientClipping(1e-3), accumulate_grad_batches=accumulate)
    assert len(recorder.clipped) == 4
    for step in range(accumulate - 1, 4, accumulate):
        for task in TASKS:
            before, after = recorder.gradients[step][task], recorder.clipped[step][task]
            assert norm_of(before) > 2e-3
            torch.testing.assert_close(after, before * 1e-3 / norm_of(before), rtol=1e-2, atol=1e-9)


def test_gradients_of_16_mixed_are_clipped_unscaled(tmp_path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    recorder = run(tmp_path, Weighted(), PromptGradientClipping(1e-2), plugins=[plugin])
    norms = [norm_of(gradient) for step in recorder.clipped for gradient in step.values()]
    assert norms and all(norm == pytest.approx(1e-2, rel=1e-2) for norm in norms)


def test_an_optimizer_that_hides_its_gradients_is_refused(tmp_path) -> None:
    class Fused(Weighted):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), fused=True)

    for callback in (PromptGradientClipping(), CollapseGuard()):
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        with pytest.raises(SoftPromptError, match="fused=False"):
            run(tmp_path, Fused(), callback, plugins=[plugin])


def test_clipping_twice_is_refused(tmp_path) -> None:
    with pytest.raises(SoftPromptError, match="gradient_clip_val to None"):
        run(tmp_path, Weighted(), PromptGradientClipping(), gradient_clip_val=1.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PromptGradientClipping(0), "above 0"),
        (lambda: PromptGradientClipping(method="norms"), "'norm', 'value'"),
        (lambda: PromptGradientClipping(scope="tasks"), "'task', 'global', 'token'"),
        (lambda: PromptGradientNorm(0), "at least 1"),
        (lambda: CollapseGuard(on_collapse="skip"), "'warn', 'rewind', 'stop'"),
        (lambda: CollapseGuard(on_spike="clip"), "on_spike must be one of"),
        (lambda: CollapseGuard(patience=0), "patience must be at least 1"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make, message: str) -> None:
    with pytest.raises(SoftPromptError, match=message):
        make()


def test_a_callback_without_prompts_says_so(tmp_path) -> None:
    for callback in (PromptGradientClipping(), CollapseGuard(), PromptGradientNorm()):
        with pytest.raises(SoftPromptError, match="add SoftPromptCallback"):
            trainer(tmp_path, callback).fit(modules.Plain(), loader())


def test_one_task_a_thousand_times_the_others_takes_their_steps_away_under_a_global_norm(tmp_path) -> None:
    def distance(*callbacks, always=None, **options) -> float:
        """How far the other tasks ended from where they end without the loud one's weight."""
        loud = run(tmp_path, Weighted(always=always), *callbacks, **options).end[-1]
        calm = run(tmp_path, Weighted(), *callbacks, **options).end[-1]
        return max(norm_of(loud[task] - calm[task]) / norm_of(calm[task]) for task in ("beta", "gamma"))

    always = {"alpha": 1000.0}
    assert distance(PromptGradientClipping(), always=always) == 0.0
    assert distance(always=always, gradient_clip_val=1.0) > 1e-3


# ---------------------------------------------------------------- the monitor


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


def test_the_figure_shows_every_task_clips_and_events(tmp_path) -> None:
    monitor, guard = PromptGradientNorm(every_n_steps=1), CollapseGuard()
    module = Weighted({(2, "beta"): math.nan})
    run(tmp_path, module, monitor, guard, PromptGradientClipping(1e-2))
    figure = monitor.plot()
    figure.savefig(tmp_path / "health.png")
    norms, prompt_norms, _, likeness, _ = figure.axes
    assert [line.get_label() for line in norms.get_lines()] == NAMES
    assert len(prompt_norms.get_lines()) == len(NAMES) + 1  # and the event
    assert [label.get_text() for label in likeness.get_xticklabels()] == NAMES
    clipped = [len(points.get_offsets()) for points in norms.collections[: len(NAMES)]]
    assert clipped == [4, 3, 4]  # beta's third step was skipped
    with pytest.raises(SoftPromptError, match=r"after trainer\.fit"):
        PromptGradientNorm().plot()


# ---------------------------------------------------------------- the guard


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_stages_keep_their_order_whatever_the_list(order: tuple[int, ...], tmp_path) -> None:
    stages = [SoftPromptCallback(dict(TASKS)), PromptGradientNorm(1), CollapseGuard(), PromptGradientClipping(1e-2)]
    recorder = Recorder()
    torch.manual_seed(0)
    run_of = trainer(tmp_path, *(stages[index] for index in order), recorder)
    run_of.fit(Weighted({(1, "beta"): math.nan}), loader(24, 6))
    assert [type(callback) for callback in run_of.callbacks if callback in stages] == [type(stage) for stage in stages]
    assert stages[2].events and math.isnan(dict(stages[1].history["grad_norm/beta"])[1])
    assert "beta" not in recorder.clipped[1]
    assert norm_of(recorder.clipped[1]["alpha"]) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_for_its_task_alone(bad: float, tmp_path) -> None:
    guard = CollapseGuard()
    calm = run(tmp_path, Weighted(), PromptGradientClipping())
    found = run(tmp_path, Weighted({(2, "beta"): bad}), guard, PromptGradientClipping())
    for step in range(4):
        for task in ("alpha", "gamma"):
            assert torch.equal(found.end[step][task], calm.end[step][task]), (step, task)
    assert torch.equal(found.end[2]["beta"], found.start[2]["beta"])
    assert not torch.equal(found.end[3]["beta"], found.start[3]["beta"])
    for name, value in found.moments[1]["beta"].items():
        assert torch.equal(found.moments[2]["beta"][name], value), name
    assert [(event.step, event.task, event.seen, event.action) for event in guard.events] == [
        (2, "beta", "nonfinite", "skip")
    ]


def test_a_loss_that_tasks_share_is_blamed_on_the_one_that_spoiled_it(tmp_path) -> None:
    guard, calm = CollapseGuard(), run(tmp_path, Silent())
    found = run(tmp_path, Silent({(2, "beta"): math.nan}), guard)
    assert [(event.step, event.task) for event in guard.events] == [(2, "beta")]
    assert all(torch.equal(found.end[-1][task], calm.end[-1][task]) for task in ("alpha", "gamma"))


def test_without_an_event_a_run_is_bit_for_bit_the_run_without_the_guard(tmp_path) -> None:
    with_guard = run(tmp_path, Weighted(), guard := CollapseGuard(snapshot_every_n_steps=1), count=96)
    without = run(tmp_path, Weighted(), count=96)
    assert not guard.events
    for step, prompts in enumerate(without.end):
        assert all(torch.equal(prompts[task], with_guard.end[step][task]) for task in TASKS)


def test_a_spike_is_skipped(tmp_path) -> None:
    guard = CollapseGuard()
    recorder = run(tmp_path, Weighted({(12, "gamma"): 1e5}), guard, count=96)
    assert [(event.step, event.task, event.seen) for event in guard.events] == [(12, "gamma", "spike")]
    assert torch.equal(recorder.end[12]["gamma"], recorder.start[12]["gamma"])
    assert not torch.equal(recorder.end[12]["alpha"], recorder.start[12]["alpha"])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_collapse_is_rewound_prompt_and_moments_and_goes_on_slower(optimizer: type, tmp_path, caplog) -> None:
    # The loss of gamma turns into five times what it was.
    guard = CollapseGuard(snapshot_every_n_steps=4, on_spike="warn")
    weights = {(step, "gamma"): 5.0 for step in range(12, 400)}
    with caplog.at_level(logging.WARNING, "lightning_softprompt"):
        recorder = run(tmp_path, Weighted(weights, optimizer=optimizer), guard, count=6 * 26)
    collapse = next(event for event in guard.events if event.seen == "collapse")
    assert collapse.task == "gamma" and collapse.action == "rewind"
    assert {event.task for event in guard.events} == {"gamma"}
    assert str(collapse) in caplog.text and "the task was put back" in caplog.text
    back = int(collapse.detail.split("back to step ")[1].split(",")[0])
    assert back < 16  # the last one that was well
    assert torch.equal(recorder.end[collapse.step]["gamma"], recorder.start[back]["gamma"])
    kept = recorder.moments[back - 1]["gamma"]
    assert recorder.moments[collapse.step]["gamma"].keys() == kept.keys()
    assert all(torch.equal(recorder.moments[collapse.step]["gamma"][name], kept[name]) for name in kept)
    # The next step is a quarter of what the optimizer would take from there.
    step, prompt = collapse.step + 1, nn.Parameter(recorder.start[collapse.step + 1]["gamma"].clone())
    prompt.grad = recorder.gradients[step]["gamma"]
    other = optimizer([prompt], lr=0.01)
    other.state[prompt] = copy.deepcopy(kept)
    other.step()
    whole = prompt.detach() - recorder.start[step]["gamma"]
    taken = recorder.end[step]["gamma"] - recorder.start[step]["gamma"]
    torch.testing.assert_close(taken, whole / 4, rtol=1e-3, atol=1e-7)


def test_a_skipped_last_step_costs_nothing(tmp_path) -> None:
    guard = CollapseGuard()
    recorder = run(tmp_path, module := Weighted({(3, "beta"): math.nan}), guard)
    assert [event.action for event in guard.events] == ["skip"]
    assert torch.equal(module.model.soft_prompts["beta"], recorder.start[3]["beta"])


def test_a_prompt_that_ends_as_no_number_is_put_back(tmp_path) -> None:
    guard = CollapseGuard(on_nonfinite="warn")
    recorder = run(tmp_path, module := Weighted({(3, "beta"): math.nan}), guard)
    assert [event.action for event in guard.events] == ["warn", "rewind"]
    assert torch.equal(module.model.soft_prompts["beta"], recorder.start[0]["beta"])


def test_many_bad_steps_in_a_row_are_one_rewind(tmp_path) -> None:
    guard = CollapseGuard(snapshot_every_n_steps=4)
    weights = {(step, "beta"): math.nan for step in range(30, 40)}
    recorder = run(tmp_path, module := Weighted(weights), guard, count=6 * 42)
    assert [event.action for event in guard.events] == ["skip"] * 3 + ["rewind"] + ["skip"] * 6
    back = int(guard.events[3].detail.split("back to step ")[1].split(",")[0])
    assert 0 < back < 30
    assert torch.equal(recorder.end[39]["beta"], recorder.start[back]["beta"])
    assert not torch.equal(module.model.soft_prompts["beta"], recorder.start[back]["beta"])


def test_where_a_collapse_only_warns_bad_steps_are_skipped_all_the_same(tmp_path) -> None:
    guard = CollapseGuard(on_collapse="warn", patience=1)
    weights = {(step, "beta"): math.nan for step in range(3, 400)}
    recorder = run(tmp_path, module := Weighted(weights), guard, count=6 * 9)
    assert [event.action for event in guard.events] == ["skip"] * 6
    assert torch.equal(module.model.soft_prompts["beta"], recorder.start[3]["beta"])


def test_overflows_of_16_mixed_are_the_scaler_s(tmp_path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))
    recorder = run(tmp_path, Weighted(), guard := CollapseGuard(), plugins=[plugin], count=6 * 40)
    assert not guard.events
    assert torch.equal(recorder.end[0]["beta"], recorder.start[0]["beta"])  # skipped, as the scale is far too high
    assert not torch.equal(recorder.end[-1]["beta"], recorder.start[0]["beta"])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_losses_of_a_module_that_logs_nothing_are_those_of_its_batches(
    accumulated: int, scaled: bool, tmp_path
) -> None:
    seen = []

    class Noting(Silent):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.append(float(loss.detach()))
            return loss

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    options = {"plugins": [plugin]} if scaled else {}
    run(tmp_path, Noting(), guard := CollapseGuard(), accumulate_grad_batches=accumulated, **options)
    steps = [sum(seen[at : at + accumulated]) / accumulated for at in range(0, len(seen), accumulated)]
    assert guard.state_dict()["health"]["beta"]["first_losses"] == pytest.approx(steps, rel=1e-5)


def test_a_snapshot_from_before_the_first_step_takes_the_moments_away() -> None:
    prompt = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([prompt])
    before = Snapshot.take(0, prompt, optimizer)
    prompt.grad = torch.ones(2, 3)
    optimizer.step()
    assert optimizer.state[prompt]
    before.put_back(prompt, optimizer)
    assert torch.equal(prompt, torch.ones(2, 3)) and not optimizer.state.get(prompt)


def test_the_ring_keeps_the_first_and_the_newest_two_and_hands_each_of_these_out_once() -> None:
    ring, prompt = Snapshots(), nn.Parameter(torch.ones(2, 3))
    for step in range(5):
        ring.add(Snapshot.take(step, prompt, torch.optim.SGD([prompt])))
    assert [snapshot.step for snapshot in ring.snapshots] == [0, 3, 4]
    assert [ring.take_back().step for _ in range(4)] == [4, 3, 0, 0]


@pytest.mark.parametrize("method", ["percentile", "zscore"])
def test_a_gradient_of_zeros_counts_in_no_statistics(method: str) -> None:
    clipping, prompts = PromptGradientClipping(method=method), gradients_of()
    prompts["small"].grad.zero_()
    clipping.clip(prompts)
    assert set(clipping.state_dict()["limits"]) == {"large", "middle"}


def test_each_optimizer_has_the_losses_of_its_tasks(tmp_path) -> None:
    class Two(Weighted):
        def __init__(self, weights) -> None:
            super().__init__(weights)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            prompts = self.model.soft_prompts
            return [
                torch.optim.AdamW([prompts["alpha"], prompts["beta"]], lr=0.01),
                torch.optim.AdamW([prompts["gamma"]]),
            ]

    # global_step counts both optimizers' steps.
    guard = CollapseGuard(on_spike="warn")
    run(tmp_path, Two({(step, "gamma"): 5.0 for step in range(24, 400)}), guard, count=6 * 26)
    assert [event.task for event in guard.events if event.seen == "collapse"] == ["gamma"]


def test_a_task_counts_the_losses_of_its_own_batches(tmp_path) -> None:
    """Micro-batches of one task each, of a module that logs nothing: beta's alone rise."""
    weights = {(step, "beta"): 5.0 for step in range(12, 400)}
    guard = CollapseGuard(on_spike="warn")
    rows = modules.Rows(6 * 3 * 26)
    order = sorted(range(len(rows)), key=lambda row: (row // 18, row % 3))  # six rows of each task in turn
    rows.rows = [rows.rows[index] for index in order]
    batches = torch.utils.data.DataLoader(rows, batch_size=6, collate_fn=rows.collate)
    callbacks = [SoftPromptCallback(dict(TASKS)), guard]
    trainer(tmp_path, *callbacks, accumulate_grad_batches=3).fit(Silent(weights), batches)
    assert {event.task for event in guard.events} == {"beta"}


def test_updates_of_a_task_that_was_put_back_are_those_taken(tmp_path) -> None:
    weights = {(step, "gamma"): 5.0 for step in range(12, 400)}
    guard, monitor = CollapseGuard(snapshot_every_n_steps=4, on_spike="warn"), PromptGradientNorm(1)
    recorder = run(tmp_path, Weighted(weights), guard, monitor, count=6 * 26)
    step = next(event.step for event in guard.events if event.seen == "collapse") + 1
    start, end = recorder.start[step]["gamma"], recorder.end[step]["gamma"]
    assert dict(monitor.history["update_ratio/gamma"])[step] == pytest.approx(
        norm_of(end - start) / norm_of(start), rel=1e-4
    )


def test_a_run_that_ends_in_a_collapse_ends_at_the_last_good_prompt(tmp_path) -> None:
    guard = CollapseGuard(snapshot_every_n_steps=4, on_spike="warn")
    weights = {(step, "gamma"): 5.0 for step in range(12, 400)}
    module = Weighted(weights)
    recorder = run(tmp_path, module, guard, count=6 * 18)
    (event,) = [event for event in guard.events if event.seen == "collapse"]
    assert event.step == 18 and "training ends" in event.detail
    back = int(event.detail.split("back to step ")[1].split(",")[0])
    assert torch.equal(module.model.soft_prompts["gamma"], recorder.start[back]["gamma"])


def test_a_stop_says_what_was_seen_when_and_what_to_try(tmp_path, caplog) -> None:
    guard = CollapseGuard(on_nonfinite="stop")
    with caplog.at_level(logging.WARNING, "lightning_softprompt"):
        recorder = run(tmp_path, Weighted({(2, "beta"): math.nan}), guard, count=60)
    assert len(recorder.end) == 3
    assert "step 2, task 'beta'" in caplog.text and "lower learning rate" in caplog.text


def test_a_warning_changes_nothing(tmp_path) -> None:
    weights = {(12, "gamma"): 1e5}
    guard = CollapseGuard(on_spike="warn")
    found, without = run(tmp_path, Weighted(weights), guard, count=96), run(tmp_path, Weighted(weights), count=96)
    assert [event.action for event in guard.events] == ["warn"]
    assert all(torch.equal(found.end[-1][task], without.end[-1][task]) for task in TASKS)


def test_everything_goes_on_after_a_resume_as_if_there_had_been_none(tmp_path) -> None:
    weights = {(3, "beta"): math.nan, **{(step, "gamma"): 5.0 for step in range(12, 400)}}

    def callbacks() -> tuple[Callback, ...]:
        return (
            PromptGradientNorm(2),
            CollapseGuard(snapshot_every_n_steps=4, on_spike="warn"),
            PromptGradientClipping(method="percentile"),
        )

    def fit(epochs: int, checkpoint: str | None = None) -> tuple[Trainer, tuple[Callback, ...], Weighted]:
        torch.manual_seed(0)
        stages, module = callbacks(), Weighted(weights)
        saving = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        options = dict(max_epochs=epochs, enable_checkpointing=True)
        this = trainer(tmp_path, SoftPromptCallback(dict(TASKS)), *stages, saving, **options)
        this.fit(module, loader(6 * 10, 6), ckpt_path=checkpoint, weights_only=True)
        return this, stages, module

    _, whole, module = fit(4)
    fit(2)
    _, resumed, other = fit(4, str(tmp_path / "2" / "last.ckpt"))
    assert any(event.seen == "collapse" for event in whole[1].events)
    assert resumed[1].events == whole[1].events
    assert repr(resumed[0].history) == repr(whole[0].history)  # one is not a number, and equal to nothing
    assert resumed[2].state_dict() == whole[2].state_dict()
    for task in TASKS:
        assert torch.equal(module.model.soft_prompts[task], other.model.soft_prompts[task]), task


# ---------------------------------------------------------------- beside other things


def test_the_learning_rate_finder_works_with_mixed_tasks(tmp_path) -> None:
    stages = [SoftPromptCallback(dict(TASKS)), PromptGradientNorm(1), CollapseGuard(), PromptGradientClipping()]
    module = modules.Plain()
    this = trainer(tmp_path, *stages, max_epochs=2)
    finder = Tuner(this).lr_find(module, loader(24), num_training=12, early_stop_threshold=None)
    assert finder is not None and finder.suggestion(skip_begin=1, skip_end=1) and len(finder.results["lr"]) >= 12
    fresh = SoftPrompts.for_model(tiny.tiny_model("llama"), TASKS)
    for task in TASKS:
        assert torch.equal(module.model.soft_prompts[task].cpu(), fresh[task])  # put back
    this.fit(module, loader(24))
    assert stages[1].history and all(not torch.equal(module.model.soft_prompts[task], fresh[task]) for task in TASKS)


def test_each_task_may_have_a_rate_of_its_own(tmp_path) -> None:
    class Rates(Weighted):
        def configure_optimizers(self):
            prompts = self.model.soft_prompts
            rates = {"alpha": 1.0, "beta": 0.1, "gamma": 0.0}
            return torch.optim.SGD([{"params": [prompts[task]], "lr": rate} for task, rate in rates.items()])

    recorder = run(tmp_path, Rates(), PromptGradientClipping(1e-2))
    for task, rate in {"alpha": 1.0, "beta": 0.1, "gamma": 0.0}.items():
        expected = recorder.start[0][task] - rate * recorder.clipped[0][task]
        assert torch.equal(recorder.end[0][task], expected)


def test_ranks_decide_alike(tmp_path) -> None:
    """Two processes whose rows are of different tasks; one task is spoiled on one rank."""
    command = [sys.executable, "-m", "tests.integration.two_processes", str(tmp_path)]
    subprocess.run(command, check=True, timeout=240, capture_output=True, text=True)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["events"] == other["events"] == [(2, "beta", "nonfinite", "skip")]
    for task in TASKS:
        assert torch.equal(one["prompts"][task], other["prompts"][task])
        assert one["norms"][task] == other["norms"][task]
        assert all(norm <= 1e-2 * (1 + 1e-5) for norm in one["clipped"][task])
    assert one["limits"] == other["limits"] and one["limits"]
    assert one["losses"] == other["losses"] and one["losses"]["beta"]

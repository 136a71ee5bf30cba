"""`CollapseGuard` in a Trainer: what it sees, what it does about it, and that the other tasks do not feel it."""

from __future__ import annotations

import copy
import logging
import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_softprompt import CollapseGuard, PromptGradientClipping, SoftPromptCallback
from tests import modules
from tests.gradients.recorded_runs import Silent, Weighted, run
from tests.modules import TASKS, loader, trainer


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


def test_a_task_may_go_back_to_a_run_of_another_optimizer(tmp_path) -> None:
    guard, prompts = CollapseGuard(snapshot_every_n_steps=4, on_spike="warn"), SoftPromptCallback(dict(TASKS))
    momentum = partial(torch.optim.SGD, momentum=0.9)
    first, worse = Weighted(optimizer=momentum), {(step, "gamma"): 5.0 for step in range(12)}
    trainer(tmp_path, prompts, guard).fit(first, loader(6 * 16, 6))
    second = Weighted(worse)
    second.model = first.model
    callback = SoftPromptCallback(prompts.prompts)
    run_of = trainer(tmp_path, callback, guard)
    run_of.fit(second, loader(6 * 30, 6))
    back = next(event.step for event in guard.events if event.seen == "collapse" and event.action == "rewind")
    state = run_of.optimizers[0].state[callback.prompts["gamma"]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and float(state["step"]) == 30 - back - 1

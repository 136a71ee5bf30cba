"""`CollapseGuard` where a prompt or the optimizer's state for it is overwritten between steps."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_softprompt import CollapseGuard
from tests import tiny
from tests.gradients.recorded_runs import Recorder, Weighted, run


class Corrupting(Callback):
    """Writes a value into beta's prompt or into the optimizer's state for it, and looks at every snapshot."""

    def __init__(
        self, guard: CollapseGuard, *faults: tuple[int, str, float], hook: str = "on_train_batch_start"
    ) -> None:
        self.guard, self.faults = guard, faults
        setattr(self, hook, self.corrupt)

    def corrupt(self, trainer, pl_module, *arguments) -> None:
        prompt = pl_module.model.soft_prompts["beta"]
        for step, where, value in self.faults:
            if step == trainer.global_step:
                found = prompt.detach() if where == "prompt" else trainer.optimizers[0].state[prompt][where]
                found.view(-1)[0] = value

    def on_train_batch_end(self, *arguments) -> None:
        for task, snapshots in self.guard.state_dict()["snapshots"].items():
            for kept in snapshots:
                assert kept["prompt"].isfinite().all(), (task, kept["step"])
                assert all(value.isfinite().all() for value in kept["moments"].values()), (task, kept["step"])


def rewinds(guard: CollapseGuard) -> list[tuple[int, int]]:
    """The step of each rewind, and the step that it went back to."""
    happened = [event for event in guard.events if event.action == "rewind"]
    return [(event.step, int(event.detail.split("back to step ")[1].split(",")[0])) for event in happened]


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Recorder:
    """The run without the guard and without corruption."""
    return run(tmp_path_factory.mktemp("calm"), Weighted(), count=6 * 24)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["prompt", "exp_avg", "exp_avg_sq"])
def test_a_corrupted_task_is_in_no_snapshot_and_goes_back(
    where: str, value: float, hook: str, calm: Recorder, tmp_path
) -> None:
    """Snapshots are due at steps 11, 15, 19, ...; a second moment that is infinite does not show in the loss."""
    guard = CollapseGuard(snapshot_every_n_steps=1)
    corrupting = Corrupting(guard, (15, where, value), hook=hook)
    recorder = run(tmp_path, module := Weighted(), guard, corrupting, count=6 * 24)
    ((step, back),) = rewinds(guard)
    assert 15 <= step <= 19 and back in (11, 15)
    assert torch.equal(recorder.end[step]["beta"], recorder.start[back]["beta"])
    for name, kept in recorder.moments[back - 1]["beta"].items():
        assert torch.equal(recorder.moments[step]["beta"][name], kept), name
    assert module.model.soft_prompts["beta"].isfinite().all()
    assert not torch.equal(recorder.end[-1]["beta"], recorder.end[step]["beta"])
    for task in ("alpha", "gamma"):  # of the other run, whose rows a processor may round otherwise
        assert tiny.relative_error(recorder.end[-1][task], calm.end[-1][task]) < 1e-4


def test_a_corruption_right_behind_a_rewind_is_put_back_too(tmp_path) -> None:
    guard = CollapseGuard(snapshot_every_n_steps=1)
    corrupting = Corrupting(guard, *[(step, "prompt", math.nan) for step in (21, 25, 26, 27)])
    recorder = run(tmp_path, module := Weighted(), guard, corrupting, count=6 * 32)
    assert rewinds(guard) == [(24, 19), (25, 15), (26, 0), (27, 0)]
    for step, back in rewinds(guard):
        assert torch.equal(recorder.end[step]["beta"], recorder.start[back]["beta"])
        assert bool(recorder.moments[step]["beta"]) == (back > 0)
    assert module.model.soft_prompts["beta"].isfinite().all()
    assert not torch.equal(recorder.end[-1]["beta"], recorder.end[27]["beta"])


def test_a_corruption_of_the_moments_behind_one_of_the_prompt_is_put_back_too(tmp_path) -> None:
    guard = CollapseGuard(snapshot_every_n_steps=1)
    corrupting = Corrupting(guard, (21, "prompt", math.inf), (25, "exp_avg", math.nan))
    run(tmp_path, module := Weighted(), guard, corrupting, count=6 * 34)
    assert rewinds(guard) == [(24, 19), (29, 15)]
    assert module.model.soft_prompts["beta"].isfinite().all()


def test_a_corruption_in_the_last_step_behind_a_rewind_is_put_back_too(tmp_path) -> None:
    guard = CollapseGuard(snapshot_every_n_steps=1)
    first = Corrupting(guard, (21, "prompt", math.nan))
    second = Corrupting(guard, (25, "prompt", math.nan), hook="on_train_epoch_end")
    recorder = run(tmp_path, module := Weighted(), guard, first, second, count=6 * 25)
    assert rewinds(guard) == [(24, 19), (25, 15)]
    assert torch.equal(module.model.soft_prompts["beta"], recorder.start[15]["beta"])


def test_a_task_that_starts_corrupted_has_its_first_snapshot_once_it_is_finite(tmp_path) -> None:
    guard = CollapseGuard()
    corrupting = Corrupting(guard, (0, "prompt", math.nan), (6, "prompt", 0.0))
    run(tmp_path, module := Weighted(), guard, corrupting, count=6 * 8)
    assert [event.action for event in guard.events] == ["skip"] * 6
    assert [kept["step"] for kept in guard.state_dict()["snapshots"]["beta"]] == [6]
    assert module.model.soft_prompts["beta"].isfinite().all()


def test_a_task_that_was_never_finite_is_left_as_it_is(tmp_path) -> None:
    guard = CollapseGuard(on_nonfinite="warn")
    run(tmp_path, Weighted(), guard, Corrupting(guard, (0, "prompt", math.nan)), count=6 * 6)
    assert [event.action for event in guard.events] == ["warn"] * 3 + ["skip"] * 3
    assert guard.state_dict()["snapshots"]["beta"] == []

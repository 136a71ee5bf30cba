"""`PromptGradientClipping` beside PyTorch's own clipping, the papers' formulas, and runs in a Trainer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_softprompt import PromptGradientClipping, SoftPromptError
from lightning_softprompt.gradients.limits import AutoClip, ZClip
from tests.gradients.recorded_runs import Weighted, norm_of, run
from tests.modules import TASKS


def gradients_of(seed: int = 0) -> dict[str, nn.Parameter]:
    """Prompts with gradients of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    prompts = {}
    for task, (length, size) in {"small": (3, 1e-3), "large": (5, 100.0), "middle": (1, 1.0)}.items():
        prompts[task] = nn.Parameter(torch.randn(length, 8, generator=draw))
        prompts[task].grad = size * torch.randn(length, 8, generator=draw)
    return prompts


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


@pytest.mark.parametrize("scope", ["task", "global", "token"])
def test_normalized_gradients_have_one_norm_and_keep_their_direction(scope: str) -> None:
    prompts, before = gradients_of(), gradients_of()
    PromptGradientClipping(0.5, "normalized", scope).clip(prompts)
    for task, prompt in before.items():
        for row, given in zip(prompts[task].grad, prompt.grad, strict=True):
            torch.testing.assert_close(row / norm_of(row), given / norm_of(given), rtol=1e-5, atol=1e-6)
            assert scope != "token" or norm_of(row) == pytest.approx(0.5, rel=1e-5)
        assert scope != "task" or norm_of(prompts[task].grad) == pytest.approx(0.5, rel=1e-5)
    if scope == "global":
        assert norm_of(torch.cat([prompt.grad for prompt in prompts.values()])) == pytest.approx(0.5, rel=1e-5)


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
    for other_method in {"norm", "percentile", "zscore"} - {method}:  # which has no use for these norms
        anew = PromptGradientClipping(1e9, method=other_method, scope=scope)
        anew.load_state_dict(clipping.state_dict())
        assert not anew._limits


@pytest.mark.parametrize("scope", ["task", "global", "token"])
@pytest.mark.parametrize("method", ["norm", "normalized", "value", "percentile", "zscore", "agc"])
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


@pytest.mark.parametrize("method", ["percentile", "zscore"])
def test_a_gradient_of_zeros_counts_in_no_statistics(method: str) -> None:
    clipping, prompts = PromptGradientClipping(method=method), gradients_of()
    prompts["small"].grad.zero_()
    clipping.clip(prompts)
    assert set(clipping.state_dict()["limits"]) == {"large", "middle"}


def test_normalized_zeros_stay_zeros() -> None:
    prompts = gradients_of()
    prompts["small"].grad.zero_()
    PromptGradientClipping(method="normalized").clip(prompts)
    assert not prompts["small"].grad.any() and norm_of(prompts["middle"].grad) == pytest.approx(1, rel=1e-5)


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


def test_clipping_twice_is_refused(tmp_path) -> None:
    with pytest.raises(SoftPromptError, match="gradient_clip_val to None"):
        run(tmp_path, Weighted(), PromptGradientClipping(), gradient_clip_val=1.0)


def test_one_task_a_thousand_times_the_others_takes_their_steps_away_under_a_global_norm(tmp_path) -> None:
    def distance(*callbacks, always=None, **options) -> float:
        """How far the other tasks ended from where they end without the loud one's weight."""
        loud = run(tmp_path, Weighted(always=always), *callbacks, **options).end[-1]
        calm = run(tmp_path, Weighted(), *callbacks, **options).end[-1]
        return max(norm_of(loud[task] - calm[task]) / norm_of(calm[task]) for task in ("beta", "gamma"))

    always = {"alpha": 1000.0}
    assert distance(PromptGradientClipping(), always=always) == 0.0
    assert distance(always=always, gradient_clip_val=1.0) > 1e-3


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

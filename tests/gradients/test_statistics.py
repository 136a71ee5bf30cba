"""The statistics of one step, against numpy in float64 around a plain optimizer's step."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor, nn

from lightning_softprompt.gradients.statistics import StepStatistics

BAND = torch.tensor([1.0, 2.0, 3.0])
RATE = 0.5


def prompts_with_gradients(*tasks: str) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    prompts = {task: nn.Parameter(torch.randn(length, 6, generator=draw)) for length, task in enumerate(tasks, 2)}
    for prompt in prompts.values():
        prompt.grad = torch.randn(prompt.shape, generator=draw)
    return prompts


def array(values: Tensor) -> numpy.ndarray:
    """A copy in float64."""
    return values.detach().double().numpy().copy()


def norm(values: numpy.ndarray) -> float:
    return float(numpy.sqrt((values**2).sum()))


def test_a_step_is_measured_as_numpy_measures_it() -> None:
    prompts = prompts_with_gradients("one", "other")
    starts = {task: array(prompt) for task, prompt in prompts.items()}
    gradients = {task: array(prompt.grad) for task, prompt in prompts.items()}
    measured = StepStatistics(3)
    measured.before(prompts)
    prompts["one"].grad.mul_(0.25)  # what clipping does between the two looks
    prompts["other"].grad = None  # and what a skip does
    torch.optim.SGD(prompts.values(), lr=RATE).step()
    measured.after()
    found = measured.values(BAND)
    for task in prompts:
        assert found[f"grad_norm/{task}"] == pytest.approx(norm(gradients[task]), rel=1e-5)
        assert found[f"prompt_norm/{task}"] == pytest.approx(norm(starts[task]), rel=1e-5)
    assert found["grad_norm_clipped/one"] == pytest.approx(norm(gradients["one"]) / 4, rel=1e-5)
    expected = RATE * norm(gradients["one"]) / 4 / norm(starts["one"])
    assert found["update_ratio/one"] == pytest.approx(expected, rel=1e-4)
    assert found["grad_norm_clipped/other"] == found["update_ratio/other"] == 0
    total = norm(numpy.concatenate([gradient.ravel() for gradient in gradients.values()]))
    assert found["grad_norm/total"] == pytest.approx(total, rel=1e-5)
    one, other = (start.mean(0) for start in starts.values())
    assert found["task_similarity"] == pytest.approx(one @ other / norm(one) / norm(other), abs=1e-5)


def test_a_second_step_in_one_batch_takes_the_place_of_the_first_for_its_tasks_alone() -> None:
    prompts = prompts_with_gradients("one", "other")
    optimizer, measured = torch.optim.SGD(prompts.values(), lr=RATE), StepStatistics(0)
    once = {task: (array(prompt), array(prompt.grad)) for task, prompt in prompts.items()}
    measured.before(prompts)
    optimizer.step()
    measured.after()
    prompts["one"].grad = 3 * prompts["one"].grad
    prompts["other"].grad = None
    twice = {"one": (array(prompts["one"]), array(prompts["one"].grad)), "other": once["other"]}
    measured.before({"one": prompts["one"]})
    optimizer.step()
    measured.after()
    found = measured.values(BAND)
    for task, (start, gradient) in twice.items():
        assert found[f"grad_norm/{task}"] == pytest.approx(norm(gradient), rel=1e-5)
        assert found[f"grad_norm_clipped/{task}"] == pytest.approx(norm(gradient), rel=1e-5)
        assert found[f"update_ratio/{task}"] == pytest.approx(RATE * norm(gradient) / norm(start), rel=1e-4)


def test_a_step_that_was_never_taken_has_a_gradient_and_no_update() -> None:
    """As under "16-mixed", where the scaler leaves a step out; and one task is like no other."""
    prompts = prompts_with_gradients("one")
    measured = StepStatistics(0)
    measured.before(prompts)
    found = measured.values(BAND)
    assert found["grad_norm/one"] == pytest.approx(norm(array(prompts["one"].grad)), rel=1e-5)
    assert found["grad_norm/total"] == pytest.approx(found["grad_norm/one"], rel=1e-6)
    assert not {"grad_norm_clipped/one", "update_ratio/one", "task_similarity"} & set(found)

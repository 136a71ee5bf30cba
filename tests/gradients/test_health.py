"""How one task does, told from its losses and gradient norms."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lightning_softprompt.gradients.health import FIRST, WINDOW, Health


def healthy(patience: int = 3) -> Health:
    """A task after its start: losses around 2, norms around 1."""
    health, draw = Health(patience), random.Random(0)
    for _ in range(FIRST):
        assert health.step(draw.gauss(2, 0.1), draw.gauss(1, 0.1), (10.0, 0.1)) is None
    return health


def feed(health: Health, count: int, loss: float, norm: float = 1.0, signals=(10.0, 0.1)) -> list[str]:
    draw = random.Random(1)
    found = [health.step(draw.gauss(loss, 0.05), norm, signals) for _ in range(count)]
    return [symptom.seen for symptom in found if symptom is not None]


def test_a_task_that_learns_or_stands_still_is_well() -> None:
    for loss in (2.0, 1.0, 0.01):
        health = healthy()
        assert feed(health, 400, loss) == [] and health.is_vouched_for and health.ends_badly() is None


def test_noise_alone_is_no_collapse() -> None:
    draw = random.Random(0)
    for _ in range(200):
        health = Health(3)
        for _ in range(200):
            assert health.step(max(draw.gauss(2, 0.8), 0.0), draw.lognormvariate(0, 0.5), (10.0, 0.1)) is None


def test_a_loss_above_its_start_is_a_collapse_after_patience_looks() -> None:
    health = healthy()
    assert feed(health, 3 * WINDOW - 1, 3.0) == [] and not health.is_vouched_for
    assert health.ends_badly()
    assert feed(health, 1, 3.0) == ["collapse"]
    health.rewound()
    assert not health.ends_badly() and feed(health, 3 * WINDOW - 1, 3.0) == []


@pytest.mark.parametrize("losses", [(3.0, 30.0), (1e3, 1e3, 2.1, 1e6), tuple(2.0**step for step in range(2, 50))])
def test_losses_that_swing_or_run_away_are_a_collapse(losses) -> None:
    health, found = healthy(), []
    for loss in itertools.islice(itertools.cycle(losses), 12):
        found.append(health.step(loss, 1.0, (10.0, 0.1)))
    assert found[-1] is not None and found[-1].seen == "collapse"


@pytest.mark.parametrize(
    "norm, signals, said",
    [(1e-5, (10.0, 0.1), "vanished"), (1.0, (200.0, 0.1), "drifted"), (1.0, (10.0, 0.999), "become one")],
)
def test_odd_signals_are_a_collapse_where_the_loss_is_not_below_its_start(norm, signals, said) -> None:
    health = healthy()
    found = [health.step(2.05, norm, signals) for _ in range(60)]
    assert any(symptom is not None and symptom.seen == "collapse" and said in symptom.detail for symptom in found)
    health = healthy()
    assert feed(health, 60, 1.0, norm, signals) == []


def test_a_spike_is_told_from_a_new_level() -> None:
    health = healthy()
    assert feed(health, 1, 2.0, 300.0) == ["spike"] and health.spikes == 1
    assert feed(health, 1, 2.0) == [] and not health.spikes
    assert feed(health, 40, 2.0, 300.0) == ["spike"] * 3
    assert feed(health, 40, 2.0, 400.0) == []


def test_a_task_that_has_learnt_may_meet_a_hard_row() -> None:
    health = healthy()
    assert feed(health, 100, 0.01, 1e-5) == []
    assert feed(health, 1, 0.5, 1.0) == []


def test_steps_in_a_row_that_are_not_finite_are_a_collapse() -> None:
    health = healthy()
    bad = ((math.nan, 1.0), (2.0, math.inf), (None, math.nan), (math.inf, 1.0))
    seen = [health.step(loss, norm, None) for loss, norm in bad]
    assert [symptom.seen for symptom in seen] == ["nonfinite"] * 3 + ["collapse"]
    assert health.step(2.0, 1.0, None) is None and health.not_finite == 0

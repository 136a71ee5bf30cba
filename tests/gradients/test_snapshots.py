"""Snapshots of a prompt and its optimizer's moments, and the ring that keeps them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_softprompt.gradients.snapshots import Snapshot, Snapshots


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_makes_a_snapshot_that_is_not(bad: float) -> None:
    good, spoiled = torch.ones(2, 3), torch.ones(2, 3)
    spoiled[1, 2] = bad
    moments: list[dict[str, Any]] = [
        {},
        {"step": torch.tensor(3), "average": good},
        {"old": [good, good], "scale": 1.5, "count": 2, "kept": {"name": "x", "none": None, "codes": good.byte()}},
    ]
    assert all(Snapshot(0, good, each).is_finite for each in moments)
    assert not Snapshot(0, spoiled, {}).is_finite
    for each in ({"average": spoiled}, {"step": torch.tensor(bad)}, {"old": [good, spoiled]}, {"a": {"b": (bad,)}}):
        assert not Snapshot(0, good, each).is_finite


def test_a_checkpoint_gives_back_the_snapshots_that_are_finite() -> None:
    good = [Snapshot(step, torch.ones(2, 3), {"average": torch.ones(2, 3)}) for step in (3, 5)]
    bad = Snapshot(4, torch.ones(2, 3), {"average": torch.full((2, 3), math.inf)})
    again = Snapshots.from_state(Snapshots([good[0], bad, good[1]]).state())
    assert [snapshot.step for snapshot in again.snapshots] == [3, 5]

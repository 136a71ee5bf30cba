"""Snapshots of a prompt and its optimizer's moments, and the ring that keeps them."""

from __future__ import annotations

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

"""Copies of a prompt and of its optimizer's moments, kept in memory so that `CollapseGuard` can go back to them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NEWEST = 2  # number of snapshots that are kept in addition to the first


@dataclass(frozen=True)
class Snapshot:
    """The state of one task at a step.

    Attributes:
        step: the step of the optimizer.
        prompt: the prompt, `[length, hidden]`.
        moments: the optimizer's state for this prompt; empty before its first step.
    """

    step: int
    prompt: Tensor
    moments: dict[str, Any]

    @classmethod
    def take(cls, step: int, prompt: nn.Parameter, optimizer: Optimizer) -> Snapshot:
        """Copy the prompt and the optimizer's state for it."""
        return cls(step, prompt.detach().clone(), _copied(optimizer.state.get(prompt, {})))

    @property
    def is_finite(self) -> bool:
        """Whether the prompt and all numbers among the moments are finite. Waits for the device once."""
        numbers = itertools.chain([self.prompt], _numbers(self.moments))
        return bool(torch.stack([number.isfinite().all().to(self.prompt.device) for number in numbers]).all())

    @torch.no_grad()
    def put_back(self, prompt: nn.Parameter, optimizer: Optimizer) -> None:
        """Give the prompt and the optimizer's state for it the values of this snapshot."""
        prompt.copy_(self.prompt)
        live = optimizer.state.pop(prompt, {})
        if self.moments:
            optimizer.state[prompt] = {
                name: _beside(live.get(name), value, prompt) for name, value in _copied(self.moments).items()
            }


@dataclass
class Snapshots:
    """The first snapshot of a task and its newest two."""

    snapshots: list[Snapshot] = field(default_factory=list)

    def add(self, snapshot: Snapshot) -> None:
        """Keep a snapshot; if there are too many, drop the oldest one after the first."""
        self.snapshots.append(snapshot)
        if len(self.snapshots) > 1 + NEWEST:
            del self.snapshots[1]

    def take_back(self) -> Snapshot:
        """Return the newest snapshot and, unless it is the only one, remove it.

        If the task goes wrong again, the snapshot was taken too late, and the next older one is needed.
        """
        return self.snapshots.pop() if len(self.snapshots) > 1 else self.snapshots[0]

    def fits(self, prompt: Tensor) -> bool:
        """Whether all snapshots have the shape of this prompt."""
        return all(snapshot.prompt.shape == prompt.shape for snapshot in self.snapshots)

    def forget_moments(self) -> None:
        """Let the snapshots be those of a fresh optimizer; the one that they were taken of may be of another kind."""
        self.snapshots = [replace(snapshot, moments={}) for snapshot in self.snapshots]

    def state(self) -> list[dict[str, Any]]:
        """All snapshots as tensors and primitives, for a checkpoint."""
        return [asdict(snapshot) for snapshot in self.snapshots]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> Snapshots:
        """The snapshots of a checkpoint, without those that are not finite, which older versions could take."""
        return cls([snapshot for saved in state if (snapshot := Snapshot(**saved)).is_finite])


def _numbers(value: Any) -> Iterator[Tensor]:
    """The tensors and floats in an optimizer's state for a parameter, which some optimizers nest."""
    if isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(each)
    elif isinstance(value, Tensor | float):
        yield torch.as_tensor(value)


def _copied(moments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in moments.items()
    }


def _beside(live: Any, value: Any, prompt: nn.Parameter) -> Any:
    """`value` on the device of the optimizer's current value `live`, or of the prompt if there is none.

    Snapshots from a checkpoint are on the CPU. PyTorch's optimizers may keep their step counters there, too.
    """
    if not isinstance(value, Tensor):
        return value
    return value.to(live.device if isinstance(live, Tensor) else prompt.device)

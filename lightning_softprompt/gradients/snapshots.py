"""A prompt and its optimizer's moments, kept in memory to go back to."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NEWEST = 2  # beside the first


@dataclass(frozen=True)
class Snapshot:
    """How one task was at a step.

    Attributes:
        step: of the optimizer.
        prompt: `[length, hidden]`.
        moments: what the optimizer keeps of this prompt; empty before its first step.
    """

    step: int
    prompt: Tensor
    moments: dict[str, Any]

    @classmethod
    def take(cls, step: int, prompt: nn.Parameter, optimizer: Optimizer) -> Snapshot:
        """A copy."""
        return cls(step, prompt.detach().clone(), _copied(optimizer.state.get(prompt, {})))

    @torch.no_grad()
    def put_back(self, prompt: nn.Parameter, optimizer: Optimizer) -> None:
        """Let the prompt and its moments be what they were."""
        prompt.copy_(self.prompt)
        live = optimizer.state.pop(prompt, {})
        if self.moments:
            optimizer.state[prompt] = {
                name: _beside(live.get(name), value, prompt) for name, value in _copied(self.moments).items()
            }


@dataclass
class Snapshots:
    """The first snapshot of a task, and the newest few."""

    snapshots: list[Snapshot] = field(default_factory=list)

    def add(self, snapshot: Snapshot) -> None:
        """Keep it in place of the oldest beside the first."""
        self.snapshots.append(snapshot)
        if len(self.snapshots) > 1 + NEWEST:
            del self.snapshots[1]

    def take_back(self) -> Snapshot:
        """The newest, which is not handed out again: what leads to harm twice was taken too late. The first stays."""
        return self.snapshots.pop() if len(self.snapshots) > 1 else self.snapshots[0]

    def fits(self, prompt: Tensor) -> bool:
        """Whether its snapshots are of this prompt's shape."""
        return all(snapshot.prompt.shape == prompt.shape for snapshot in self.snapshots)

    def state(self) -> list[dict[str, Any]]:
        """Tensors and primitives."""
        return [asdict(snapshot) for snapshot in self.snapshots]


def _copied(moments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in moments.items()
    }


def _beside(live: Any, value: Any, prompt: nn.Parameter) -> Any:
    """Where the optimizer keeps it: a snapshot of a checkpoint lies on the CPU, step counters may do so anyway."""
    if not isinstance(value, Tensor):
        return value
    return value.to(live.device if isinstance(live, Tensor) else prompt.device)

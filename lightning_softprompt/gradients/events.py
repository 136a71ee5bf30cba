"""What happened to a task in training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One event.

    Attributes:
        step: of the optimizer.
        task: whose.
        seen: "nonfinite", "spike" or "collapse".
        action: "warn", "skip", "rewind" or "stop".
        detail: what was seen, in words and numbers.
    """

    step: int
    task: str
    seen: str
    action: str
    detail: str

    def __str__(self) -> str:
        return f"step {self.step}, task {self.task!r}: {self.detail}; {_DONE[self.action]}"


_DONE = {
    "warn": "nothing was done",
    "skip": "the task's step was skipped",
    "rewind": "the task was put back",
    "stop": "training stops",
}

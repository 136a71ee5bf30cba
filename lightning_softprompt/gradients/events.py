"""`Event`: something that `CollapseGuard` saw in training, and what it did about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something that went wrong with a task, and what was done about it.

    Attributes:
        step: the step of the optimizer.
        task: the task's name.
        seen: what went wrong: "nonfinite", "spike" or "collapse".
        action: what was done: "warn", "skip", "rewind" or "stop".
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

"""Which task each row of a batch belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

Routing = Tensor | Sequence[str | int | None] | str

HOW_TO_ROUTE = (
    "pass task_ids=prompts.task_ids([…]) or tasks=[names…] to the model, or put 'task_ids' or 'tasks' into the batch"
)


def from_batch(batch: Any) -> Routing | None:
    """The routing that a batch or a call carries under `task_ids` or `tasks`, or None."""
    names = ("task_ids", "tasks")
    found = [batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None) for name in names]
    if None not in found:
        raise SoftPromptError("both task_ids and tasks are given; leave one of them out")
    return found[0] if found[0] is not None else found[1]


def resolve(prompts: SoftPrompts, routing: Routing | None) -> tuple[int, ...] | None:
    """Task indices of the rows, -1 for none, from whatever form the user gave; None where there is no routing.

    Raises:
        SoftPromptError: an index out of range, an unknown name, another type.
    """
    if routing is None:
        return None
    if isinstance(routing, Tensor):
        if routing.ndim != 1 or routing.is_floating_point() or routing.is_complex():
            raise SoftPromptError(
                f"task_ids must be an integer tensor [batch], got {routing.dtype} {list(routing.shape)}; {HOW_TO_ROUTE}"
            )
        entries: Sequence[Any] = routing.tolist()
    elif isinstance(routing, str) or not isinstance(routing, Sequence):
        raise SoftPromptError(
            f"task_ids must be a tensor [batch] or a list with one task a row, got {routing!r}; {HOW_TO_ROUTE}"
        )
    else:
        entries = routing
    return tuple(_index(prompts, entry) for entry in entries)


def tasks_of_rows(prompts: SoftPrompts, found: tuple[int, ...] | None, rows: int, repeats: bool) -> tuple[int, ...]:
    """One task for each of `rows` rows; the only task where there is one, and nothing was said.

    Args:
        prompts: whose tasks they are.
        found: what `resolve` gave.
        rows: how many rows there are.
        repeats: rows may stand several times in place, as beams do.

    Raises:
        SoftPromptError: nothing says which row is which, or another number of tasks than of rows.
    """
    if found is None:
        if len(prompts) != 1:
            raise SoftPromptError(f"there are {len(prompts)} tasks and nothing says which row is which; {HOW_TO_ROUTE}")
        return (0,) * rows
    if len(found) == rows:
        return found
    if repeats and found and rows % len(found) == 0:
        return tuple(task for task in found for _ in range(rows // len(found)))
    raise SoftPromptError(f"{len(found)} tasks were given for {rows} rows; {HOW_TO_ROUTE}")


def _index(prompts: SoftPrompts, entry: object) -> int:
    if entry is None:
        return -1
    if isinstance(entry, str):
        return int(prompts.task_ids([entry])[0])
    if isinstance(entry, Tensor) and entry.ndim == 0:
        entry = entry.item()
    if isinstance(entry, int) and not isinstance(entry, bool) and -1 <= entry < len(prompts):
        return entry
    known = ", ".join(f"{index}: {task!r}" for index, task in enumerate(prompts.tasks))
    raise SoftPromptError(f"task id {entry!r} is out of range; -1 is no prompt, known tasks: {known}")

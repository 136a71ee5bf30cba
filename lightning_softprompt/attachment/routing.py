"""Which task each row of a batch belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.transfer import to_device

Routing = Tensor | Sequence[str | int | None] | str
Tasks = tuple[str | None, ...]


@dataclass(frozen=True)
class Route:
    """Which tasks the rows of a call have. Their names stay what they are, whatever comes and goes in the bank.

    Attributes:
        tasks: of the rows, None for no prompt; None in place of all where the call said nothing.
        repeats: whether the model may see each row several times in succession, as beam search does; so only in
            `generate`.
        columns_to_come: columns of text that will follow; 0 where nothing tells.
        source: the tensor that the tasks were read from, and the version that it had; None for none.
    """

    tasks: Tasks | None = None
    repeats: bool = False
    columns_to_come: int = 0
    source: tuple[Tensor, int] | None = None

    @property
    def has_prompts(self) -> bool:
        """Whether a row has a prompt; true where the call named no tasks."""
        return self.tasks is None or any(task is not None for task in self.tasks)


class RowsOnDevice(NamedTuple):
    """What a device has to know of the rows, int64.

    Attributes:
        places: as `TaskRows` has them, `[batch]`.
        lengths: likewise, `[batch]`.
        offsets: where the prompts of the active tasks begin and end, packed one after another, `[active + 1]`.
    """

    places: Tensor
    lengths: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class TaskRows:
    """The task of each row. It is made once for each call, on the CPU.

    Attributes:
        tasks: of the rows, None for no prompt.
        active: the distinct tasks among them, in the order of their names: so they go through the model.
        places: the position of each row's task among the active ones, -1 for no prompt.
        lengths: virtual tokens in front of each row.
        active_lengths: virtual tokens of each active task.
    """

    tasks: Tasks
    active: tuple[str, ...]
    places: tuple[int, ...]
    lengths: tuple[int, ...]
    active_lengths: tuple[int, ...]
    _copies: dict[torch.device, RowsOnDevice] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, prompts: SoftPrompts, tasks: Tasks) -> TaskRows:
        """From the names of the rows' tasks."""
        active = prompts.distinct(tasks)
        place: dict[str | None, int] = {task: index for index, task in enumerate(active)}
        length: dict[str | None, int] = {task: len(prompts[task]) for task in active}
        places, lengths = tuple(place.get(task, -1) for task in tasks), tuple(length.get(task, 0) for task in tasks)
        return cls(tasks, active, places, lengths, tuple(length.values()))

    def part(self, which: slice) -> TaskRows:
        """Some of the rows, with the same active tasks."""
        return TaskRows(self.tasks[which], self.active, self.places[which], self.lengths[which], self.active_lengths)

    def on(self, device: torch.device) -> RowsOnDevice:
        """The rows on a device. They are copied once, however often they are asked for."""
        if device not in self._copies:
            offsets = (0, *accumulate(self.active_lengths))
            self._copies[device] = RowsOnDevice(*to_device(device, self.places, self.lengths, offsets))
        return self._copies[device]


HOW_TO_ROUTE = (
    "pass task_ids=prompts.task_ids([…]) or tasks=[names…] to the model, or put 'task_ids' or 'tasks' into the batch"
)


def from_batch(batch: Any) -> Routing | None:
    """The routing that a batch or a call carries under `task_ids` or `tasks`, or None.

    A batch of several parts, as `(inputs, targets)`, may carry it in one of them. Where more parts than one do, as
    those of several loaders, each call of the model has to say its own.
    """
    names = ("task_ids", "tasks")
    found = [batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None) for name in names]
    if all(each is not None for each in found):
        raise SoftPromptError("both task_ids and tasks are given; leave one of them out")
    own = found[0] if found[0] is not None else found[1]
    if own is not None or not isinstance(batch, list | tuple):
        return own
    parts = [routing for routing in map(from_batch, batch) if routing is not None]
    return parts[0] if len(parts) == 1 else None


def resolve(prompts: SoftPrompts, routing: Routing | None, around: Route | None = None) -> Tasks | None:
    """The tasks of the rows, None for none, from whatever form the user gave; None where there is no routing.

    Args:
        prompts: whose tasks these are.
        routing: what the user gave.
        around: an enclosing route. A tensor that it was read from is not read again, as that waits for the device.

    Raises:
        SoftPromptError: an index out of range, an unknown name, another type.
    """
    if routing is None:
        return None
    if around is not None and _is_source(source_of(routing), around.source):
        return around.tasks
    if isinstance(routing, Tensor):
        if routing.ndim != 1 or routing.is_floating_point() or routing.is_complex():
            raise SoftPromptError(
                f"task_ids must be an integer tensor [batch], got {routing.dtype} {list(routing.shape)}; {HOW_TO_ROUTE}"
            )
        entries: Sequence[Any] = routing.tolist()
    elif hasattr(routing, "tolist") and getattr(routing, "ndim", 0) == 1:  # an array of NumPy, a series of pandas
        entries = routing.tolist()
    elif isinstance(routing, str) or not isinstance(routing, Sequence):
        raise SoftPromptError(
            f"task_ids must be a tensor [batch] or a list with one task a row, got {routing!r}; {HOW_TO_ROUTE}"
        )
    else:
        entries = routing
    known = prompts.tasks  # the same for all entries, though another thread may add and remove tasks meanwhile
    return tuple(_task(prompts, known, entry) for entry in entries)


def source_of(routing: Routing | None) -> tuple[Tensor, int] | None:
    """A tensor on a device and its version, by which it is known again; None for anything else.

    What stands on the CPU is read again at no cost, and may have been changed through NumPy, which no version tells.
    """
    if not isinstance(routing, Tensor) or routing.device.type == "cpu" or routing.is_inference():
        return None
    return routing, routing._version


def _is_source(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    return one is not None and other is not None and one[0] is other[0] and one[1] == other[1]


def rows_of(prompts: SoftPrompts, route: Route, count: int) -> TaskRows:
    """The task of each of `count` rows. Where the call names no tasks and there is one task alone, all rows have it.

    Raises:
        SoftPromptError: nothing says which row is which, or another number of tasks than of rows.
    """
    tasks = route.tasks
    if tasks is None:
        known = prompts.tasks
        if len(known) != 1:
            raise SoftPromptError(f"there are {len(known)} tasks and nothing says which row is which; {HOW_TO_ROUTE}")
        return TaskRows.of(prompts, known * count)
    if len(tasks) == count:
        return TaskRows.of(prompts, tasks)
    if route.repeats and tasks and count % len(tasks) == 0:
        return TaskRows.of(prompts, tuple(task for task in tasks for _ in range(count // len(tasks))))
    raise SoftPromptError(f"{len(tasks)} tasks were given for {count} rows; {HOW_TO_ROUTE}")


def _task(prompts: SoftPrompts, known: Sequence[str], entry: object) -> str | None:
    if entry is None:
        return None
    if isinstance(entry, str):
        prompts.check_known(entry)
        return entry
    if hasattr(entry, "item") and getattr(entry, "ndim", None) == 0:  # of a tensor, or of NumPy
        entry = entry.item()
    if isinstance(entry, int) and not isinstance(entry, bool) and -1 <= entry < len(known):
        return None if entry == -1 else known[entry]
    named = ", ".join(f"{index}: {task!r}" for index, task in enumerate(known))
    raise SoftPromptError(f"task id {entry!r} is out of range; -1 is no prompt, known tasks: {named}")

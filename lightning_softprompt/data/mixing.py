"""The order of the training rows of many tasks: how often each task comes, and which rows each rank takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DistributedSampler

from lightning_softprompt.distributed import has_several_ranks
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.seeding import generator

_WINDOW = 64  # number of batches whose rows are sorted by length together


class Mixing(DistributedSampler[Any]):
    """The common part of `TaskMixing` and `StreamMixing`: the ranks, the seed, and a position from which to resume.

    It is a `DistributedSampler` because Lightning replaces any other sampler by one of its own if there are several
    ranks.

    Args:
        total: number of rows in an epoch, of all ranks together.
        seed: the seed of all orders.
        num_replicas: number of ranks that share the rows; None means all processes.
        rank: the rank of this process among them; None finds it out.
        drop_last: whether to leave out the last rows if the rows do not divide evenly among the ranks; if False, some
            rows come twice.
    """

    def __init__(
        self, total: int, seed: int, num_replicas: int | None, rank: int | None, drop_last: bool = False
    ) -> None:
        if num_replicas is None or rank is None:
            several = has_several_ranks()
            num_replicas = distributed.get_world_size() if several else 1
            rank = distributed.get_rank() if several else 0
        rows: Any = range(total)
        super().__init__(rows, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=drop_last)
        self.skipped = 0  # number of rows at the beginning of this rank's order that were taken before the run resumed


def shares_of(
    sizes: Mapping[str, int], total: int, temperature: float, size_limit: int | None = None
) -> dict[str, int]:
    """How many of the `total` rows of an epoch each task gets, by the formula of `TaskMixing` and largest remainders.

    Args:
        sizes: the number of rows that each task has.
        total: the number of rows in an epoch.
        temperature: see `TaskMixing`.
        size_limit: see `TaskMixing`.

    Raises:
        SoftPromptError: a temperature or a limit that is not positive.
    """
    if not temperature > 0:
        raise SoftPromptError(f"temperature must be a number above 0, got {temperature!r}")
    if size_limit is not None and size_limit < 1:
        raise SoftPromptError(f"size_limit must be at least 1 row, or None, got {size_limit!r}")
    limited = {task: min(size, size_limit or size) for task, size in sizes.items()}
    most = max(limited.values(), default=1)
    weights = {task: math.exp(math.log(size / most) / temperature) for task, size in limited.items()}
    exact = {task: total * weight / sum(weights.values()) for task, weight in weights.items()}
    counts = {task: int(share) for task, share in exact.items()}
    missing = total - sum(counts.values())
    for task in sorted(exact, key=lambda task: counts[task] - exact[task])[:missing]:
        counts[task] += 1
    for task in [task for task, count in counts.items() if not count]:  # every task gets at least one row
        counts[max(counts, key=counts.__getitem__)] -= 1
        counts[task] = 1
    return counts


class TaskMixing(Mixing):
    """The indices of the rows that this rank takes in an epoch. All ranks together take as many rows as there are.

    A task's share of the epoch is that of T5 (Raffel et al. 2020, arXiv 1910.10683, section 3.5.2): proportional to
    `min(n, size_limit) ** (1 / temperature)` if it has n rows. If a task has more rows than its share, the other rows
    come in the next epochs; if it has fewer, its rows come again, in another order.

    The order depends only on the seed and the epoch, so a resumed run continues in the same order.

    Args:
        tasks: the task of each row.
        seed: the seed of all orders.
        temperature: with 1 and without a `size_limit`, every row comes once per epoch; above 1, rows of small tasks
            come more often; with infinity, all tasks come equally often.
        size_limit: the number of rows above which a task's share grows no further; None sets no limit.
        round_robin: whether the tasks take turns, one row each; all tasks then come equally often.
        lengths: the number of tokens of each row, to put rows of similar length into one batch; None does not group.
        batch_size: number of rows in a batch of one rank; only used with `lengths`.
        num_replicas: number of ranks that share the rows; None means all processes.
        rank: the rank of this process among them; None finds it out.

    Raises:
        SoftPromptError: `round_robin` together with `lengths`, or a temperature or a limit that is not positive.

    Example:
        >>> mixing = TaskMixing(["big"] * 6 + ["small"] * 2, seed=0, temperature=float("inf"))
        >>> sum(row < 6 for row in mixing), len(mixing)
        (4, 8)
    """

    def __init__(
        self,
        tasks: Sequence[str],
        seed: int,
        temperature: float = 1.0,
        size_limit: int | None = None,
        round_robin: bool = False,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if round_robin and lengths is not None:
            raise SoftPromptError("rows in turn by task cannot be grouped by length, too; choose one of them")
        super().__init__(len(tasks), seed, num_replicas, rank)
        self._rows: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            self._rows.setdefault(task, []).append(index)
        self._in_turn = round_robin
        self._lengths = lengths
        self._batch_size = batch_size
        sizes = {task: len(rows) for task, rows in self._rows.items()}
        self.counts = shares_of(sizes, len(tasks), math.inf if round_robin else temperature, size_limit)

    def __iter__(self) -> Iterator[int]:
        queues = {task: self._next_rows(task, count) for task, count in self.counts.items()}
        if self._in_turn:
            longest = max(self.counts.values(), default=0)
            order = [rows[turn] for turn in range(longest) for rows in queues.values() if turn < len(rows)]
        else:
            rows = [row for queue in queues.values() for row in queue]
            order = [rows[position] for position in self._permutation(len(rows), "order", self.epoch)]
        if self._lengths is not None:
            order = self._grouped(order, self._lengths)
        # All ranks take the same number of rows, because they step together; some rows come twice to fill up.
        order += (order * math.ceil(self.total_size / max(len(order), 1)))[: self.total_size - len(order)]
        return iter(order[self.rank : self.total_size : self.num_replicas][self.skipped :])

    def _next_rows(self, task: str, count: int) -> list[int]:
        """The rows of a task for this epoch, taken from an endless sequence of shuffled passes over its rows."""
        rows, start = self._rows[task], self.epoch * count
        found: list[int] = []
        while len(found) < count:
            number, position = divmod(start + len(found), len(rows))
            order = self._permutation(len(rows), task, number)
            found += [rows[at] for at in order[position : position + count - len(found)]]
        return found

    def _grouped(self, order: list[int], lengths: Sequence[int]) -> list[int]:
        """Put rows of similar length next to each other, a batch of all ranks at a time, and shuffle these batches."""
        size = self._batch_size * self.num_replicas
        batches = []
        for start in range(0, len(order), size * _WINDOW):
            window = sorted(order[start : start + size * _WINDOW], key=lambda row: -lengths[row])
            batches += [window[at : at + size] for at in range(0, len(window), size)]
        partial = [batch for batch in batches if len(batch) < size]
        whole = [batch for batch in batches if len(batch) == size]
        drawn = [whole[position] for position in self._permutation(len(whole), "batches", self.epoch)]
        # Incomplete batches come last, because they would shift the rows of all batches behind them.
        return [row for batch in (*drawn, *partial) for row in batch]

    def _permutation(self, length: int, *parts: object) -> list[int]:
        return torch.randperm(length, generator=generator(self.seed, *parts), device="cpu").tolist()

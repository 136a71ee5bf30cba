"""In which order training rows of many tasks come: how often each task, seeded by epoch, shared out among ranks."""

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

_WINDOW = 64  # batches whose rows are sorted by length together


class Mixing(DistributedSampler[Any]):
    """What `TaskMixing` and `StreamMixing` have in common: ranks, the seed, and a position in the epoch to go on from.

    Lightning leaves a `DistributedSampler` as it is, where it would put its own in place of any other sampler.

    Args:
        total: rows of an epoch, of all ranks together.
        seed: of all orders.
        num_replicas: how many share the rows out; None: all processes.
        rank: which of them this is.
        drop_last: whether rows that do not divide evenly are left out; else some come twice.
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
        self.skipped = 0  # rows at the beginning of this rank's order that come no more


def shares_of(
    sizes: Mapping[str, int], total: int, temperature: float, size_limit: int | None = None
) -> dict[str, int]:
    """Rows of each task in an epoch of `total`, by largest remainders; `sizes` are rows it has. See `TaskMixing`."""
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
    for task in [task for task, count in counts.items() if not count]:  # every task trains
        counts[max(counts, key=counts.__getitem__)] -= 1
        counts[task] = 1
    return counts


class TaskMixing(Mixing):
    """Indices of the rows of an epoch, on every rank its own; an epoch has as many rows as the data.

    A task's share is that of T5 (Raffel et al. 2020, arXiv 1910.10683, section 3.5.2): proportional to
    `min(n, size_limit) ** (1 / temperature)` for n rows. A task that has more than its share has the rest of its rows
    in the next epochs; one that has less has its rows again, in another order.

    The order is drawn from the seed and the epoch alone, so that a resumed run goes on in it.

    Args:
        tasks: of each row.
        seed: of all orders.
        temperature: 1: every row once an epoch, if nothing is limited; above: small tasks more often; infinite: all
            tasks alike.
        size_limit: what more rows of a task do not count; None: they do.
        round_robin: tasks in turn, and all alike.
        lengths: of each row in tokens, to put rows of like length into one batch of `batch_size`; None: not to.
        batch_size: rows a batch on a rank.
        num_replicas: how many share the rows out; None: all processes.
        rank: which of them this is.

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
        # Every rank the same number, as it steps with the others: some rows come twice then.
        order += (order * math.ceil(self.total_size / max(len(order), 1)))[: self.total_size - len(order)]
        return iter(order[self.rank : self.total_size : self.num_replicas][self.skipped :])

    def _next_rows(self, task: str, count: int) -> list[int]:
        """Of an endless row of passes over the task's rows, those of this epoch."""
        rows, start = self._rows[task], self.epoch * count
        found: list[int] = []
        while len(found) < count:
            number, position = divmod(start + len(found), len(rows))
            order = self._permutation(len(rows), task, number)
            found += [rows[at] for at in order[position : position + count - len(found)]]
        return found

    def _grouped(self, order: list[int], lengths: Sequence[int]) -> list[int]:
        """Rows of like length beside each other, in batches of all ranks; the batches in a drawn order."""
        size = self._batch_size * self.num_replicas
        batches = []
        for start in range(0, len(order), size * _WINDOW):
            window = sorted(order[start : start + size * _WINDOW], key=lambda row: -lengths[row])
            batches += [window[at : at + size] for at in range(0, len(window), size)]
        partial = [batch for batch in batches if len(batch) < size]
        whole = [batch for batch in batches if len(batch) == size]
        drawn = [whole[position] for position in self._permutation(len(whole), "batches", self.epoch)]
        return [row for batch in (*drawn, *partial) for row in batch]  # a part of a batch would shift those behind it

    def _permutation(self, length: int, *parts: object) -> list[int]:
        return torch.randperm(length, generator=generator(self.seed, *parts)).tolist()

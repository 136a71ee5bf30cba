"""Training rows that are read only when needed: shuffled in a buffer, mixed by source, starting at any position."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_softprompt.data.mixing import Mixing, shares_of
from lightning_softprompt.data.sources import read
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.seeding import generator

logger = logging.getLogger("lightning_softprompt")

_BUFFER = 10_000  # number of rows that are shuffled together
_MANY = 100_000  # number of rows whose skipping takes long enough for a warning


class RowStream:
    """The rows of a data set in an endless sequence of passes, each in another order, starting at any position.

    Args:
        data: a `datasets.IterableDataset`.
        num_rows: number of rows of an epoch, before shares are computed. A pass over the data may have another number.
        seed: the seed of the orders, together with the number of the pass.
        name: the name of the data set in messages.
        encode: a function that makes an example from a row.
        left_out: a function that is called with the reason why a row cannot be encoded; the row is left out then. None
            means that such a row raises an error.
    """

    def __init__(
        self,
        data: Any,
        num_rows: int,
        seed: int,
        name: str,
        encode: Callable[[dict[str, Any]], Any],
        left_out: Callable[[str], None] | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.encode = encode
        self._data = data.shuffle(seed=seed, buffer_size=_BUFFER)
        self._name = name
        self._left_out = left_out
        self._told = 0
        self._position = -1
        self._rows: Iterator[dict[str, Any]] = iter(())

    def rows_from(self, position: int) -> Iterator[dict[str, Any]]:
        """Rows from number `position` on, counted over all passes. Only a step back reads the data from the start.

        Raises:
            SoftPromptError: a row that cannot be read, or data without any row that can be used.
        """
        if not 0 <= self._position <= position:
            self._position, self._rows = 0, self._passes()
        if position - self._position > _MANY:
            logger.warning(
                "%s: reading and skipping %d rows, to go on behind them", self._name, position - self._position
            )
        try:
            for row in self._rows:
                self._position += 1
                if self._position > position:
                    yield row
        except Exception:
            self._position = -1  # a failed iterator gives no more rows, so the next call starts a new one
            raise

    def _passes(self) -> Iterator[dict[str, Any]]:
        for number in count():
            self._data.set_epoch(number)
            found = False
            bad = 0
            for row in read(self._data, self._name):
                reason = self._reason_against(row)
                if reason is None:
                    found = True
                    yield row
                    continue
                bad += 1
                if number == 0 and bad > self._told:  # each bad row is reported once, though it comes in every pass
                    self._told = bad
                    self._left_out(reason)  # type: ignore[misc]
            if not found:
                raise SoftPromptError(f"{self._name} has no row that can be used")

    def _reason_against(self, row: dict[str, Any]) -> str | None:
        if self._left_out is None:
            return None
        try:
            self.encode(row)
        except SoftPromptError as error:
            return str(error)
        return None


class StreamMixing(Mixing):
    """The examples that this rank takes from several streams in an epoch.

    All ranks together take as many rows as the streams' `num_rows` add up to. The shares are those of `TaskMixing`, for
    streams in place of tasks. Every rank reads all streams and keeps only its own rows, so the order is the same for
    any number of ranks. It depends only on the seed and the epoch. To resume, the rows before the position are read
    and dropped.

    Args:
        streams: the streams to mix.
        seed: the seed of all orders.
        temperature: see `TaskMixing`.
        size_limit: see `TaskMixing`.
        round_robin: whether the streams take turns, one row each; all streams then come equally often.
        num_replicas: number of ranks that share the rows; None means all processes.
        rank: the rank of this process among them; None finds it out.
    """

    def __init__(
        self,
        streams: Sequence[RowStream],
        seed: int,
        temperature: float = 1.0,
        size_limit: int | None = None,
        round_robin: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        total = sum(stream.num_rows for stream in streams)
        super().__init__(total, seed, num_replicas, rank, drop_last=True)
        self._streams, self._in_turn = streams, round_robin
        sizes = {str(index): stream.num_rows for index, stream in enumerate(streams)}
        shares = shares_of(sizes, total, math.inf if round_robin else temperature, size_limit)
        self.counts = list(shares.values())

    def __iter__(self) -> Iterator[Any]:
        rows = [stream.rows_from(self.epoch * share) for stream, share in zip(self._streams, self.counts, strict=True)]
        for position, stream in enumerate(self._order()):  # all of it, because the next epoch begins where it ends
            row = next(rows[stream])
            number, rank = divmod(position, self.num_replicas)
            if rank == self.rank and self.skipped <= number < self.num_samples:
                yield self._streams[stream].encode(row)

    def _order(self) -> Iterator[int]:
        """The stream of each row. Unless the streams take turns, all orders with these counts are equally likely."""
        left = torch.tensor(self.counts, dtype=torch.float64, device="cpu")
        draw, turn = generator(self.seed, "streams", self.epoch), 0
        while left.any():
            if self._in_turn:
                stream, turn = turn, (turn + 1) % len(left)
            else:
                stream = int(torch.multinomial(left, 1, generator=draw))
            if left[stream]:
                left[stream] -= 1
                yield stream


class PassThrough(Dataset[Any]):
    """A data set that returns what it is asked for, for a loader whose sampler gives examples in place of indices."""

    def __init__(self, total: int) -> None:
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, example: Any) -> Any:
        if isinstance(example, int):
            raise SoftPromptError("rows of a stream have no numbers, which overfit_batches needs; set streaming=False")
        return example

"""Training rows that are read as they are needed: shuffled in a buffer, mixed by source, from any position on."""

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

_BUFFER = 10_000  # rows that are shuffled together
_MANY = 100_000  # rows that take a while to read


class RowStream:
    """The rows of a data set, pass after pass without an end, each in an order of its own, from any position on.

    Args:
        data: a `datasets.IterableDataset`.
        num_rows: rows of an epoch, where no other share is asked for. It need not be what a pass has.
        seed: of the orders, with the number of the pass.
        name: what messages call it.
        encode: makes an example of a row.
        left_out: is told why a row cannot be encoded, which is left out then. None: that ends the run.
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
        """Rows from the `position`-th of all passes on. What goes on where it stands does not read anew."""
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
            self._position = -1  # nothing comes from an iterator that has failed
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
                if number == 0 and bad > self._told:  # once, though it comes in every pass
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
    """Rows of several streams for an epoch, on every rank its own; an epoch has as many rows as the streams together.

    Shares are those of `TaskMixing`, of streams in place of tasks. Every rank reads the streams and takes its rows of
    them, so that the order is that of one process. It is drawn from the seed and the epoch alone; to go on in it, rows
    that came already are read, and no more.

    Args:
        streams: what to mix.
        seed: of all orders.
        temperature: see `TaskMixing`.
        size_limit: see `TaskMixing`.
        round_robin: streams in turn, and all alike.
        num_replicas: how many share the rows out; None: all processes.
        rank: which of them this is.
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
        for position, stream in enumerate(self._order()):  # to its end, where the next epoch begins
            row = next(rows[stream])
            number, rank = divmod(position, self.num_replicas)
            if rank == self.rank and self.skipped <= number < self.num_samples:
                yield self._streams[stream].encode(row)

    def _order(self) -> Iterator[int]:
        """From which stream each row comes: all orders of these counts are as likely."""
        left = torch.tensor(self.counts, dtype=torch.float64)
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
    """The data set of a loader whose sampler gives the examples themselves."""

    def __init__(self, total: int) -> None:
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, example: Any) -> Any:
        if isinstance(example, int):
            raise SoftPromptError("rows of a stream have no numbers, which overfit_batches needs; set streaming=False")
        return example

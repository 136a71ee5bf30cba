"""Which of the rows that wait come next: in the order in which they came, as many as fit."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from lightning_softprompt.errors import check_at_least_one
from lightning_softprompt.serving.rows import LabelRow, Row, TextRow

# The most tokens, pads included, that are read at once while rows wait for their next tokens; a longer row is read by
# itself.
_READ_AT_ONCE = 2048
# Measured with 135 million weights in float32 on one core; estimated from the bandwidth and the speed of an H100.
_TOKENS_AS_LONG_AS_FETCHING = {"cpu": 32, "cuda": 300}

AnyRow = TypeVar("AnyRow", TextRow, LabelRow)


@dataclass(frozen=True)
class Limits:
    """How much is taken on at once.

    Attributes:
        max_rows: of the rows under way.
        max_batch_tokens: the most tokens of the rows under way when their answers are complete, pads included: their
            number times the length of the longest.
        max_queue: the most rows that wait.

    Raises:
        SoftPromptError: a limit below 1.
    """

    max_rows: int = 64
    max_batch_tokens: int = 16_384
    max_queue: int = 256

    def __post_init__(self) -> None:
        check_at_least_one(**vars(self))


class Admission:
    """The rows that begin now, taken from the queue. They all belong to the same prompts.

    Rows that nobody waits for any more are dropped. No row overtakes another one, so that none waits for ever.

    Args:
        limits: on the rows under way.
        running: the rows under way.
        waiting: the queue; the rows that begin are taken from its left.

    Attributes:
        texts: those that are answered with free text.
        labels: those that are answered with a label.
    """

    def __init__(self, limits: Limits, running: Sequence[TextRow], waiting: deque[Row]) -> None:
        self.texts: list[TextRow] = []
        self.labels: list[LabelRow] = []
        self._limits = limits
        self._running = running
        alive = [row for row in waiting if not row.is_done]
        waiting.clear()
        waiting.extend(alive)
        while waiting and self._fits(waiting[0]):
            row = waiting.popleft()
            if isinstance(row, LabelRow):
                self.labels.append(row)
            elif isinstance(row, TextRow):
                self.texts.append(row)

    def _fits(self, row: Row) -> bool:
        chosen: list[Row] = [*self.texts, *self.labels]
        if chosen and chosen[0].prompts is not row.prompts:
            return False
        if isinstance(row, LabelRow):
            return not self.labels or _read([*self.labels, row]) <= _READ_AT_ONCE
        under_way = [*self._running, *self.texts, row]
        complete = len(under_way) * max(each.request.length for each in under_way)
        fits = len(under_way) <= self._limits.max_rows and complete <= self._limits.max_batch_tokens
        return fits and (not self.texts or _read([*self.texts, row]) <= _READ_AT_ONCE)


def _read(rows: Sequence[Row]) -> int:
    """The tokens that are read for rows in one pass, pads included."""
    return sum(row.request.rows for row in rows) * max(len(row.request.ids) for row in rows)


def in_passes(rows: Sequence[AnyRow], device: str) -> list[list[AnyRow]]:
    """Rows in the passes that read them in the least time: few passes, and few pads in each.

    A pass has to fetch all weights of the model, which takes as long as computing some more tokens.

    Args:
        rows: of any lengths.
        device: the type of device that reads them.

    Returns:
        The rows of each pass, the longest first.
    """
    ordered: list[AnyRow] = sorted(rows, key=lambda row: len(row.request.ids), reverse=True)
    counts = [0, *accumulate(row.request.rows for row in ordered)]
    fetching = _TOKENS_AS_LONG_AS_FETCHING.get(device, _TOKENS_AS_LONG_AS_FETCHING["cuda"])
    least, begins = [0], [0]  # of the first rows: what they cost, and where their last pass begins
    for end in range(1, len(ordered) + 1):
        costs = [
            least[begin] + fetching + len(ordered[begin].request.ids) * (counts[end] - counts[begin])
            for begin in range(end)
        ]
        begins.append(min(range(end), key=costs.__getitem__))
        least.append(costs[begins[-1]])
    passes: list[list[AnyRow]] = []
    end = len(ordered)
    while end:
        passes.append(ordered[begins[end] : end])
        end = begins[end]
    return passes[::-1]

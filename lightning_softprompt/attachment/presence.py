"""Which tasks had rows: counters that only grow. Each reader remembers the counts that it has seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from lightning_softprompt.attachment.lock import Lock


class Presence:
    """Counts the passes of an attached model and, for each task, those that recorded gradients of its rows.

    A thread that serves beside one that trains runs its passes without gradients, as `generate` does: those with
    gradients are taken for the training's.

    Example:
        >>> presence = Presence()
        >>> presence.count(["spam"])
        >>> _, seen = presence.since({})
        >>> presence.count(["topic"])
        >>> presence.since(seen)[0]
        {'topic'}
    """

    def __init__(self) -> None:
        self.passes = 0
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    def count(self, tasks: Iterable[str]) -> None:
        """Note a pass, and the tasks whose rows recorded gradients in it."""
        with self._lock:
            self.passes += 1
            self._counts.update(tasks)

    def since(self, seen: Mapping[str, int]) -> tuple[set[str], dict[str, int]]:
        """The tasks that had rows since the counts were `seen`, and the counts to remember as seen from now on."""
        with self._lock:
            counts = dict(self._counts)
        return {task for task, count in counts.items() if count > seen.get(task, 0)}, counts

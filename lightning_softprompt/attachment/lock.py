"""A lock that may stand in what is copied and pickled."""

from __future__ import annotations

import threading
from typing import Any


class Lock:
    """A reentrant lock; the copy of one, and what is unpickled, is an open lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()

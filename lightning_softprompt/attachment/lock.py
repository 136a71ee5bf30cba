"""A lock for objects that are copied and pickled."""

from __future__ import annotations

import threading
from typing import Any


class Lock:
    """A reentrant lock. A copy of it, or what is unpickled, is a lock of its own that nobody holds."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()

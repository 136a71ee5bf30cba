"""What a call of `generate` puts into its streamer, as an iterator that can be closed early."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from contextvars import copy_context

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class _Stopped(BaseException):
    """Ends a call of `generate` whose tokens nobody waits for. No handler of ordinary exceptions is to keep it."""


class _End:
    """Follows the last tokens."""


class Relay(BaseStreamer):
    """A streamer that hands tokens to another thread, and waits until they are taken.

    So generation is never more than two steps ahead of who reads.
    """

    def __init__(self) -> None:
        self._items: queue.Queue[Tensor | BaseException | type[_End]] = queue.Queue(maxsize=1)
        self._is_stopped = threading.Event()
        self._has_begun = False

    def put(self, value: Tensor) -> None:
        """Hand over the tokens of a step. What `generate` puts first are the texts, which are left out."""
        if self._has_begun:
            self.hand_over(value)
        self._has_begun = True

    def end(self) -> None:
        """Called by `generate` behind the last tokens. The end is handed over when `generate` has returned."""

    def hand_over(self, item: Tensor | BaseException | type[_End]) -> None:
        """Hand an item over, or raise if nobody waits for it."""
        if not self._is_stopped.is_set():
            self._items.put(item)
        if self._is_stopped.is_set():
            raise _Stopped

    def take(self) -> Tensor | BaseException | type[_End]:
        """The next item; waits for it."""
        return self._items.get()

    def stop(self) -> None:
        """From now on nobody waits for items. Whoever is handing one over goes on, and ends."""
        self._is_stopped.set()
        with suppress(queue.Empty):
            self._items.get_nowait()


def as_they_come(generate: Callable[[BaseStreamer], object]) -> Iterator[Tensor]:
    """The tokens that `generate` writes, step by step: int64 `[batch]` each.

    `generate` runs in a thread of its own, from the first step that is asked for, with the caller's context variables
    and autocast. When the iterator is closed, generation stops at its next step and the thread ends.

    Args:
        generate: calls a model's `generate` with the streamer that it is given.

    Raises:
        BaseException: what `generate` raises.
    """
    relay = Relay()
    # Autocast is a setting of a thread.
    autocast = [
        torch.autocast(kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]

    def work() -> None:
        with suppress(_Stopped):
            try:
                with ExitStack() as settings:
                    for setting in autocast:
                        settings.enter_context(setting)
                    generate(relay)
            except _Stopped:
                raise
            except BaseException as error:
                relay.hand_over(error)
            else:
                relay.hand_over(_End)

    thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        while not isinstance(item := relay.take(), type):
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # else this frame and the error would keep each other, and the tensors of its frames
            yield item
    finally:
        relay.stop()
        thread.join()

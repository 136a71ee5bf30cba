"""Tokens as they come out of a call in another thread, which ends with who reads them."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from contextvars import ContextVar

import pytest
import torch

from lightning_softprompt.inference.streaming import as_they_come

PLACE: ContextVar[str] = ContextVar("place", default="nowhere")


class Steps:
    """Stands for `generate`: puts a text and then so many tokens, and notes how far it came."""

    def __init__(self, count: int = 5, error: BaseException | None = None) -> None:
        self.count, self.error = count, error
        self.done, self.thread = 0, None

    def __call__(self, streamer) -> None:
        self.thread = threading.current_thread()
        streamer.put(torch.tensor([[7, 7, 7]]))
        for step in range(1, self.count + 1):
            self.done = step
            streamer.put(torch.tensor([step]))
        if self.error:
            raise self.error
        streamer.end()


def test_tokens_come_in_order_without_the_text() -> None:
    steps = Steps()
    assert [tokens.tolist() for tokens in as_they_come(steps)] == [[1], [2], [3], [4], [5]]
    assert steps.thread is not threading.current_thread() and not steps.thread.is_alive()
    assert list(as_they_come(Steps(0))) == []


@pytest.mark.parametrize("read", [1, 3])
@pytest.mark.parametrize("is_dropped", [False, True])
def test_who_stops_reading_stops_the_work(read: int, is_dropped: bool) -> None:
    steps = Steps(1000)
    iterator = as_they_come(steps)
    for _ in range(read):
        next(iterator)
    if is_dropped:
        del iterator
    else:
        iterator.close()
        assert list(iterator) == []
    assert not steps.thread.is_alive()
    assert read <= steps.done <= read + 2


def test_nothing_runs_before_the_first_token_is_asked_for() -> None:
    steps = Steps()
    iterator = as_they_come(steps)
    assert steps.thread is None
    iterator.close()
    assert steps.thread is None


def test_an_error_is_raised_where_the_tokens_are_read() -> None:
    found = []
    with pytest.raises(KeyError, match="lost"):
        for tokens in as_they_come(Steps(2, KeyError("lost"))):
            found.append(tokens)
    assert len(found) == 2


def test_an_error_keeps_no_memory_once_it_is_dealt_with() -> None:
    kept = []

    def generate(streamer) -> None:
        cache = torch.zeros(3)
        kept.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            list(as_they_come(generate))
        assert kept[0]() is None
    finally:
        gc.enable()


def test_the_thread_has_the_settings_of_its_caller() -> None:
    found = []

    def generate(streamer) -> None:
        found.append((PLACE.get(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    list(as_they_come(generate))
    PLACE.set("here")
    with torch.autocast("cpu", torch.float16):
        list(as_they_come(generate))
    assert found[0][:2] == ("nowhere", False) and found[1] == ("here", True, torch.float16)
    PLACE.set("nowhere")

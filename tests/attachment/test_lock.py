"""The lock: it keeps other threads out, and its copies are locks of their own."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest

from lightning_softprompt.attachment.lock import Lock


def is_free(lock: Lock) -> bool:
    """Whether another thread gets in at once."""
    entered = []

    def enter() -> None:
        with lock:
            entered.append(True)

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(0.2)
    return bool(entered)


def test_one_thread_at_a_time_and_that_one_as_often_as_it_likes() -> None:
    lock = Lock()
    with lock, lock:
        assert not is_free(lock)
    assert is_free(lock)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_a_copy_is_open_and_of_its_own(copied) -> None:
    lock = Lock()
    with lock:
        other = copied(lock)
        assert is_free(other)
    with other:
        assert is_free(lock)

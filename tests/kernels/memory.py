"""Watches the Triton interpreter: an access outside the tensors of its launch is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


@contextlib.contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Check every address; yields a list that holds how many were checked, so that a test sees it watched."""
    from triton.runtime import interpreter

    memory, begin_launch = interpreter._interpreter, interpreter.GridExecutor._init_args_hst
    bounds: list[tuple[int, int]] = []
    checked = [0]

    def note_tensors(executor: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = begin_launch(executor, args, kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        bounds[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel()]
        return args, kwargs

    def check(addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        touched = np.broadcast_to(addresses, mask.shape)[mask].astype(np.uint64).reshape(-1)
        if not touched.size:
            return
        checked[0] += touched.size
        first, last = int(touched.min()), int(touched.max()) + size
        # One access is to one tensor: all of it has to lie there.
        if not any(low <= first and last <= high for low, high in bounds):
            raise AssertionError(f"an access of {touched.size} addresses lies in none of the launch's tensors")

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(memory, name)

        def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
            check(addresses, mask, np.dtype(dtype).itemsize)
            return memory.load(addresses, mask, other, dtype)

        def store(self, addresses: Any, values: Any, mask: Any) -> Any:
            check(addresses, mask, values.dtype.itemsize)
            return memory.store(addresses, values, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", Watched())
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", note_tensors)
        yield checked


def watched(device: str) -> contextlib.AbstractContextManager[object]:
    """Watch, where a test runs interpreted."""
    return watched_memory() if device == "cpu" else contextlib.nullcontext()

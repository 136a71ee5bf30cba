"""New tokens of a mixed batch are those of the bare model on each row alone: however rows are padded, in any thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tests import tiny
from tests.conformance.outcome import ABSENT, EXACT, Mismatch

_NEW = 4
_THREADS = 3


def padded(bare: PreTrainedModel, model: PreTrainedModel, side: str, seed: int = 0, **options: Any) -> str:
    """Greedy tokens of rows padded on one side."""
    batch = tiny.random_batch(seed, side)
    expected = [_alone(bare, row, **options) for row in batch.rows]
    _require_equal(_generate(model, batch, **options), expected)
    return EXACT


def static_cache(bare: PreTrainedModel, model: PreTrainedModel) -> str:
    """The same where the bare model has such a cache, and the tokens that it has without."""
    options = {"cache_implementation": "static", "disable_compile": True}
    row = tiny.Row(0, tiny.HARD["long"], [5, 6, 7])
    try:
        has_it = _alone(bare, row, **options) == _alone(bare, row)
    except Exception:
        has_it = False
    return padded(bare, model, "left", **options) if has_it else ABSENT


def in_threads(bare: PreTrainedModel, model: PreTrainedModel) -> str:
    """Batches of other tasks in several threads, which hand over to one another in the middle of each pass."""
    batches = [tiny.random_batch(seed, "left") for seed in range(_THREADS)]
    expected = [[_alone(bare, row) for row in batch.rows] for batch in batches]
    with _slow_layers(model), ThreadPoolExecutor(_THREADS) as pool:
        for found, alone in zip(pool.map(lambda batch: _generate(model, batch), batches), expected, strict=True):
            _require_equal(found, alone)
    return EXACT


@contextmanager
def _slow_layers(model: PreTrainedModel) -> Iterator[None]:
    """Between two modules of a pass another thread has its turn."""

    def rest(*_: object) -> None:
        time.sleep(1e-4)

    leaves = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(rest) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _generate(model: PreTrainedModel, batch: tiny.Batch, **options: Any) -> list[list[int]]:
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "task_ids": batch.task_ids}
    ids = model.generate(**rows, max_new_tokens=_NEW, do_sample=False, **options)
    return ids[:, batch.input_ids.shape[1] :].tolist()


def _alone(bare: PreTrainedModel, row: tiny.Row, **options: Any) -> list[int]:
    return tiny.hard_greedy(bare, row, _NEW, do_sample=False, **options)[0]


def _require_equal(found: list[list[int]], expected: list[list[int]]) -> None:
    for index, (mine, alone) in enumerate(zip(found, expected, strict=True)):
        if mine != alone:
            raise Mismatch(f"row {index} continues {mine}, alone {alone}")

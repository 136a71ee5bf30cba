"""Whole batches, for models that keep more than keys and values: options of each row, and rows that end early."""

from __future__ import annotations

import pytest

from lightning_softprompt import attach
from lightning_softprompt.serving.batch import Batch
from lightning_softprompt.serving.engine import Engine
from lightning_softprompt.serving.whole_batch import WholeBatch
from tests import tiny
from tests.conformance import models
from tests.inference.tasks import words
from tests.serving.helpers import RAGGED, Asked, RowMaking, prompts_of, texts, wait

# Attention beside a recurrence; a recurrence alone, padded on the right.
KINDS = ["falcon_h1", "bamba", "mamba"]


def made(kind: str) -> tuple[WholeBatch, RowMaking]:
    model = models.build(kind)
    model.generation_config.eos_token_id = None
    assert Engine(model, words()).obstacle
    make = RowMaking(model, prompts_of(RAGGED, model))
    return WholeBatch(attach(model, make.prompts), pad=1), make


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_it_is_alone(kind: str) -> None:
    bare = models.build(kind)
    bare.generation_config.eos_token_id = None
    batch, make = made(kind)
    asked = [(task, text, 1 + index * 5 % 7) for index, (task, text) in enumerate(texts(9))]
    rows = [make(text, task, new) for task, text, new in asked]
    batch.join([one.row for one in rows])
    assert not batch.rows and batch.step() is None
    for one, (task, text, new) in zip(rows, asked, strict=True):
        row = tiny.Row(0, RAGGED[task] if task else [], text)
        (part,) = one.parts
        expected = tiny.hard_greedy(bare, row, new, do_sample=False)[0]
        assert [token.text for token in part.tokens] == make.decoded(expected) and part.finish_reason == "length"


def test_rows_of_unlike_lengths_share_one_batch() -> None:
    model = models.build("falcon_h1")
    model.generation_config.eos_token_id = None
    engine, make = Engine(model, words()), RowMaking(model, prompts_of(RAGGED, model))
    rows = [make([6] * 60, "task1", 3), make([7], "task8", 3)]
    engine.start()
    engine.submit([one.row for one in rows])
    wait(lambda: all(one.row.is_done for one in rows))
    engine.stop()
    engine.join(20)
    assert engine.steps == 1 and all(len(one.parts[0].tokens) == 3 for one in rows)


def drawn(batch: WholeBatch | Batch, make: RowMaking) -> list[str]:
    rows = [
        make([6, 7], "task2", 6, temperature=1.5, seed="7"),
        make([8], "task5", 4),
        make([6, 7], "task2", 6, temperature=1.5, seed="8"),
        make([6, 7], "task2", 6, temperature=1.5, seed="7", top_p=0.9),
    ]
    batch.join([one.row for one in rows])
    while batch.rows:
        batch.step()
    return [one.parts[0].text for one in rows]


def test_rows_have_options_of_their_own_as_in_a_running_batch() -> None:
    model = tiny.tiny_model()
    make = RowMaking(model, prompts_of(RAGGED, model))
    attach(model, make.prompts)
    whole = drawn(WholeBatch(model, pad=1), make)
    assert whole == drawn(Batch(model, pad=1), make) and len(set(whole)) == 4


def test_a_batch_ends_when_nobody_waits_for_it() -> None:
    batch, make = made("falcon_h1")
    rows: list[Asked] = [make([6], "task1", 40, streams=True), make([7], "task2", 2, streams=True)]
    deliver = rows[0].row.deliver

    def leave_at_the_third(part) -> None:
        deliver(part)
        rows[0].row.is_cancelled = len(rows[0].parts) == 3

    rows[0].row.deliver = leave_at_the_third
    batch.join([one.row for one in rows])
    assert len(rows[0].parts) == 3 and rows[0].row.completion_tokens == 3
    assert rows[1].parts[-1].finish_reason == "length"


def test_an_end_token_ends_its_row_alone() -> None:
    batch, make = made("falcon_h1")
    bare = models.build("falcon_h1")
    bare.generation_config.eos_token_id = None
    ids = tiny.hard_greedy(bare, tiny.Row(0, RAGGED["task1"], [6]), 5, do_sample=False)[0]
    end = frozenset([ids[2]])
    rows = [make([6], "task1", 5, end_tokens=end), make([6], "task1", 5)]
    batch.join([one.row for one in rows])
    assert [one.parts[0].finish_reason for one in rows] == ["stop", "length"]
    assert rows[0].row.completion_tokens == ids.index(ids[2]) + 1
    assert [token.text for token in rows[1].parts[0].tokens] == make.decoded(ids)

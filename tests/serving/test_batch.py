"""Rows that join and leave: each is what the bare model says of it alone, to the log-probability."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import attach
from lightning_softprompt.attachment.prefix_choice import PrefixChoice
from lightning_softprompt.serving.batch import Batch, without_inner_pads
from tests import tiny
from tests.conformance import models
from tests.serving.helpers import RAGGED, Asked, RowMaking, alone, prompts_of, texts


def of_type(kind: str):
    model = tiny.tiny_model(kind) if kind in ("llama", "gpt2") else models.build(kind)
    model.generation_config.eos_token_id = None
    return model


# Rotated, learned and relative positions; windows shorter than a row, by the mask and by the layer; positions from 2.
@pytest.mark.parametrize("prefix", ["auto", "never"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "gpt_neo", "bloom", "opt", "roberta"])
def test_rows_that_join_late_and_leave_early_are_what_they_are_alone(kind: str, prefix: PrefixChoice) -> None:
    bare, model = of_type(kind), of_type(kind)
    make = RowMaking(model, prompts_of(RAGGED, model))
    batch = Batch(attach(model, make.prompts, prefix), pad=1)
    asked = [(task, text, 1 + index * 5 % 9) for index, (task, text) in enumerate(texts(14))]
    rows = [make(text, task, new) for task, text, new in asked]
    most = 0
    for place in range(0, len(rows), 3):  # three join, two steps follow
        batch.join([one.row for one in rows[place : place + 3]])
        for _ in range(2):
            batch.step()
            most = max(most, len(batch.rows))
    while batch.rows:
        batch.step()
    batch.step()  # of nothing
    assert most >= 5
    for one, (task, text, new) in zip(rows, asked, strict=True):
        prompt = RAGGED[task] if task else []
        if kind == "roberta":  # `generate` counts its positions from 0, and a pass by hand from 2
            expected = tiny.hard_greedy(bare, tiny.Row(0, prompt, text), new, do_sample=False)[0]
            assert [token.text for token in one.parts[0].tokens] == make.decoded(expected)
            continue
        ids, logprobs = alone(bare, prompt, text, new)
        assert [token.text for token in one.parts[0].tokens] == make.decoded(ids)
        assert one.logprobs == pytest.approx(logprobs, abs=2e-4)


def cancelled(rows: list[Asked], place: int) -> None:
    rows[place].row.is_cancelled = True


def test_a_cancelled_row_leaves_at_the_next_step_and_takes_its_columns_along() -> None:
    model = tiny.tiny_model()
    make = RowMaking(model, prompts_of(RAGGED, model))
    batch = Batch(attach(model, make.prompts), pad=1)
    rows = [make([6] * 30, "task8", 20), make([6, 7], "task1", 20), make([8], None, 20)]
    batch.join([one.row for one in rows])
    widths = [batch.width]
    cancelled(rows, 0)
    batch.step()
    widths.append(batch.width)
    assert batch.rows == [rows[1].row, rows[2].row] and widths == [38, 4]
    assert not rows[0].parts
    cancelled(rows, 1)
    cancelled(rows, 2)
    batch.step()
    assert not batch.rows and batch.width == 0


def test_a_row_that_ends_with_its_first_token_never_joins() -> None:
    model = tiny.tiny_model()
    make = RowMaking(model, prompts_of(RAGGED, model))
    batch = Batch(attach(model, make.prompts), pad=1)
    one = make([6], "task2", 1)
    batch.join([one.row])
    assert not batch.rows and one.parts[0].finish_reason == "length"


def test_pads_are_moved_to_the_front() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1], [1, 0, 1, 0, 0, 1]])
    keys = torch.arange(18.0).view(3, 1, 6, 1)
    ((found, values),), new = without_inner_pads([(keys, -keys)], mask)
    assert new.tolist() == [[1, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert found[new[:, None, :, None] == 1].tolist() == [1, 2, 5, 10, 11, 12, 14, 17]
    assert torch.equal(values, -found)


@pytest.mark.parametrize("mask", [[[1, 1, 1]], [[0, 1, 1], [0, 1, 1]], [[1, 1, 0]]])
def test_where_no_pads_stand_inside_columns_are_cut_and_not_moved(mask: list[list[int]]) -> None:
    keys = torch.randn(len(mask), 2, 3, 4)
    ((found, _),), new = without_inner_pads([(keys, keys)], torch.tensor(mask))
    assert bool((new == 1).all()) and found.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    assert torch.equal(found, keys[:, :, [place for place, each in enumerate(mask[0]) if each]])

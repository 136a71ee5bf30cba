"""Generation row by row, where padded rows cannot be continued in one batch."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from tests import tiny
from tests.conformance import models


@pytest.fixture(params=["mamba", "bart"])
def pair(request: pytest.FixtureRequest):
    """A bare model without positions, and an attached copy."""
    bare = models.build(request.param)
    model = copy.deepcopy(bare)
    return bare, attach(model, SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()}))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_keep_their_ids_and_their_pads(pair, side: str) -> None:
    bare, model = pair
    batch = tiny.random_batch(1, side)
    length = batch.input_ids.shape[1]
    rows = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    out = model.generate(**rows, max_length=length + 3, do_sample=False)
    assert out.shape == (len(batch.rows), length + 3) and torch.equal(out[:, :length], batch.input_ids)
    for index, row in enumerate(batch.rows):
        assert out[index, length:].tolist() == tiny.hard_greedy(bare, row, 3, do_sample=False)[0]


def test_a_length_inside_a_configuration_counts_the_padded_text(pair) -> None:
    _, model = pair
    batch = tiny.random_batch(1, "left")
    rows = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.do_sample = batch.input_ids.shape[1] + 3, False
    assert torch.equal(model.generate(**rows, generation_config=config), model.generate(**rows, max_new_tokens=3))


def test_beams_and_rows_that_end_early(pair) -> None:
    bare, model = pair
    batch = tiny.random_batch(4, "left")
    first = tiny.hard_greedy(bare, batch.rows[0], 1, do_sample=False)[0][0]
    options = dict(num_beams=2, num_return_sequences=2, do_sample=False, eos_token_id=first)
    rows = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    out = model.generate(**rows, max_new_tokens=3, **options)
    assert len(out) == 2 * len(batch.rows)
    length = batch.input_ids.shape[1]
    for index, row in enumerate(batch.rows):
        for mine, alone in zip(out[2 * index : 2 * index + 2], tiny.hard_greedy(bare, row, 3, **options), strict=True):
            assert mine[length:].tolist() == alone + [1] * (out.shape[1] - length - len(alone))


def test_what_cannot_be_put_together_is_refused(pair) -> None:
    _, model = pair
    batch = tiny.random_batch(1, "left")
    rows = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with pytest.raises(SoftPromptError, match="one by one"):
        model.generate(**rows, max_new_tokens=2, return_dict_in_generate=True)


def test_a_positional_configuration_is_not_lost(pair) -> None:
    _, model = pair
    batch = tiny.random_batch(1, "left")
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = 2
    rows = dict(attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    out = model.generate(batch.input_ids, generation_config=config, **rows)
    assert out.shape[1] == batch.input_ids.shape[1] + 2
    assert torch.equal(model.generate(batch.input_ids, config, **rows), out)


def test_what_is_allowed_depends_on_the_row_and_ends_may_be_a_tensor(pair) -> None:
    _, model = pair
    rows = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.tensor([[1, 1], [0, 1]])}
    options = {"tasks": ["one", "short"], "max_new_tokens": 3, "do_sample": False}
    out = model.generate(**rows, **options, prefix_allowed_tokens_fn=lambda row, ids: [[10], [20]][row])
    assert out[:, 2:4].tolist() == [[10, 10], [20, 20]]  # BART ends with a token of its own
    free = model.generate(**rows, **options)[:, 2:]
    ends = torch.stack([free[0, 0], free[1, 0]])  # as many as rows, and none of them one of a row
    assert (model.generate(**rows, **options, eos_token_id=ends)[:, 2:][:, 1:] == 1).all()


def test_outputs_that_the_models_own_configuration_asks_for_are_no_reason_to_fail(pair) -> None:
    _, model = pair
    model.generation_config.return_dict_in_generate = True
    out = model.generate(torch.tensor([[5, 6], [7, 8]]), tasks=["one", "one"], max_new_tokens=2)
    assert out.sequences.shape == (2, 4)
    model.generation_config.return_dict_in_generate = False


def test_rows_that_end_early_are_padded_as_generate_pads(pair) -> None:
    bare, model = pair
    batch = tiny.random_batch(4, "left")
    first = tiny.hard_greedy(bare, batch.rows[0], 3, do_sample=False)[0][0]
    model.generation_config.pad_token_id = None
    rows = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    out = model.generate(**rows, max_new_tokens=3, do_sample=False, eos_token_id=first)
    assert out[0, batch.input_ids.shape[1] :].tolist() == [first] * (out.shape[1] - batch.input_ids.shape[1])

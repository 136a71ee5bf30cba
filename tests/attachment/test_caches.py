"""Caches of an attached model: continued, static, reordered, and refused where nothing tells what they hold."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from tests import tiny
from tests.attachment.helpers import assert_rows_equal, attached

pytestmark = pytest.mark.usefixtures("route")


@pytest.mark.parametrize("static", [False, True])
def test_continuing_from_a_cache_by_hand(kind: str, side: str, static: bool) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(15, side)
    more = torch.randint(2, tiny.VOCABULARY, (len(batch.rows), 4))
    mask = torch.cat([batch.attention_mask, torch.ones(len(batch.rows), 4, dtype=torch.int64)], 1)
    width = batch.input_ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=width + 4) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            past_key_values=cache,
            task_ids=batch.task_ids,
            use_cache=True,
        )
        assert int(first.past_key_values.get_seq_length()) == width
        step = model(input_ids=more[:, :1], attention_mask=mask[:, : width + 1], past_key_values=first.past_key_values)
        rest = model(input_ids=more[:, 1:], attention_mask=mask, past_key_values=step.past_key_values)
        for index, row in enumerate(batch.rows):
            ids = torch.tensor([row.prompt + row.text + more[index].tolist()])
            expected = bare(ids).logits[0, -4:]
            found = torch.cat([step.logits, rest.logits], 1)[index]
            assert tiny.relative_error(found, expected) < 1e-5


def test_continuing_a_generation_from_its_returned_cache(kind: str) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(16, "left")
    first = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        task_ids=batch.task_ids,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
    )
    mask = torch.cat([batch.attention_mask, torch.ones(len(batch.rows), 4, dtype=torch.int64)], 1)
    kept = copy.deepcopy(first.past_key_values)
    for cache, routing in ((first.past_key_values, {}), (kept, {"task_ids": batch.task_ids})):
        out = model.generate(
            input_ids=first.sequences,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=5,
            do_sample=False,
            **routing,
        )
        expected = [ids for row in batch.rows for ids in tiny.hard_greedy(bare, row, 9, do_sample=False)]
        assert out[:, batch.input_ids.shape[1] :].tolist() == expected


def test_selected_and_reordered_caches_keep_their_tasks(kind: str) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(22, "left")
    order = torch.tensor([3, 0, 5, 1, 1])
    more = torch.randint(2, tiny.VOCABULARY, (5, 2))
    mask = torch.cat([batch.attention_mask[order], torch.ones(5, 2, dtype=torch.int64)], 1)
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with torch.no_grad():
        for method in ("batch_select_indices", "reorder_cache"):
            cache = model(**arguments, use_cache=True).past_key_values
            getattr(cache, method)(order)
            found = model(more, attention_mask=mask, past_key_values=cache).logits
            for place, index in enumerate(order.tolist()):
                row = batch.rows[index]
                expected = bare(torch.tensor([row.prompt + row.text + more[place].tolist()])).logits[0, -2:]
                assert tiny.relative_error(found[place], expected) < 1e-5


def test_a_cache_of_other_rows_or_of_the_bare_model_is_refused(kind: str) -> None:
    bare, model, _ = attached(kind)
    ids = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        with pytest.raises(SoftPromptError, match="not filled through this attachment"):
            model(ids, past_key_values=bare(ids, use_cache=True).past_key_values, tasks=["long"] * 2)
        cache = model(ids, tasks=["long", "one"], use_cache=True).past_key_values
        with pytest.raises(SoftPromptError, match="filled for tasks"):
            model(ids[:, :1], past_key_values=cache, tasks=["one", "long"])
        with pytest.raises(SoftPromptError, match="mask of the whole text, 3 columns"):
            model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 9, dtype=torch.int64))
        cache.crop(-1)
        assert cache.get_seq_length() == 1


def test_a_recurrent_model_takes_rows_of_equal_length_and_refuses_the_rest() -> None:
    """RWKV takes no positions and reads pads: it is padded on the right and keeps its cache in a list."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=61,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        context_length=64,
        initializer_range=0.3,
        eos_token_id=None,
    )
    bare = RwkvForCausalLM(config).eval()
    bare.generation_config.eos_token_id = None
    model = copy.deepcopy(bare)
    attach(model, SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()}))
    batch = tiny.random_batch(24, "left")
    with torch.no_grad():
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    assert_rows_equal(bare, batch, out.logits)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = dict(max_new_tokens=4, do_sample=False)
    found = model.generate(ids, tasks=["short"] * 2, **options)  # without a cache, unless one is asked for
    for row, new in zip(ids.tolist(), found[:, 3:].tolist(), strict=True):
        hard = torch.tensor([tiny.HARD["short"] + row])
        assert bare.generate(hard, use_cache=False, **options)[0, -4:].tolist() == new
    with pytest.raises(SoftPromptError, match="the cache of RwkvForCausalLM is a list"):
        model.generate(ids, tasks=["short"] * 2, use_cache=True, **options)

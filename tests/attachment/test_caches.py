"""Caches of an attached model: continued, static, reordered, and refused where nothing tells what they hold."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, StaticCache

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from lightning_softprompt.attachment.caches import remember, to_bare
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


def filled(model, rows: int = 2, tasks: tuple = ("long", None)):
    ids = torch.tensor([[9, 8, 7, 6, 5], [4, 3, 9, 8, 7]])[:rows]
    return ids, model(ids, tasks=list(tasks), past_key_values=DynamicCache(config=model.config)).past_key_values


def test_what_comes_behind_a_cropped_cache_has_the_mask_that_is_given(kind: str) -> None:
    bare, model, _ = attached(kind)
    ids, mask = torch.tensor([[9, 8, 7, 1, 1], [6, 5, 4, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, tasks=["long", None], use_cache=True).past_key_values
        cache.crop(-2)
        new = torch.tensor([[30], [31]])
        found = model(new, attention_mask=torch.ones(2, 4), past_key_values=cache).logits[:, -1]
        for row, hard in enumerate((tiny.HARD["long"], [])):
            alone = bare(torch.tensor([[*hard, *ids[row, :3].tolist(), int(new[row])]])).logits[0, -1]
            assert tiny.relative_error(found[row], alone) < 1e-5


def test_a_cache_that_lost_a_part_of_its_prompts_is_refused(kind: str) -> None:
    _, model, _ = attached(kind)
    with torch.no_grad():
        _, cache = filled(model)
        cache.crop(-7)
        with pytest.raises(SoftPromptError, match="cut back to 0 columns of text, and prompts stood in what is gone"):
            model(torch.tensor([[30], [31]]), past_key_values=cache)


def test_rows_of_a_cache_that_are_repeated_and_selected_keep_their_prompts(kind: str) -> None:
    bare, model, _ = attached(kind)
    with torch.no_grad():
        ids, cache = filled(model, tasks=("long", "short"))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2]))
        new = torch.tensor([[30], [31]])
        found = model(new, past_key_values=cache).logits[:, -1]
        for row, task in enumerate(("long", "short")):
            alone = bare(torch.tensor([[*tiny.HARD[task], *ids[row].tolist(), int(new[row])]])).logits[0, -1]
            assert tiny.relative_error(found[row], alone) < 1e-5


def test_a_cache_is_pickled_with_what_is_known_of_it(kind: str) -> None:
    _, model, _ = attached(kind)
    with torch.no_grad():
        _, cache = filled(model)
        again = pickle.loads(pickle.dumps(cache))
        assert again.get_seq_length() == 5
        new = torch.tensor([[30], [31]])
        logits = [model(new, past_key_values=each).logits for each in (again, cache)]
        assert tiny.relative_error(*logits) < 1e-5
        shallow = copy.copy(filled(model)[1])
        with pytest.raises(SoftPromptError, match=r"shallow copy of is gone; copy it with copy\.deepcopy"):
            shallow.get_seq_length()


def test_a_call_that_is_refused_leaves_its_cache_empty(kind: str) -> None:
    _, model, _ = attached(kind)
    cache = DynamicCache(config=model.config)
    with pytest.raises(SoftPromptError):
        model(torch.full((1, 130), 9), tasks=["long"], attention_mask=torch.ones(1, 7), past_key_values=cache)
    assert cache.get_seq_length() == 0
    model(torch.tensor([[9, 8]]), tasks=["long"], past_key_values=cache)


def test_a_generation_that_goes_on_checks_the_prompts_of_its_cache(kind: str) -> None:
    _, model, prompts = attached(kind)
    with torch.no_grad():
        ids, cache = filled(model, tasks=("short", None))
        prompts["long"].fill_(float("nan"))  # task 0, which no row has
        more = torch.cat([ids, ids[:, :1]], 1)
        assert model.generate(more, past_key_values=cache, max_new_tokens=2).shape == (2, 8)
        ids, cache = filled(model, tasks=(None, None))
        out = model.generate(more, past_key_values=cache, max_new_tokens=2, guidance_scale=1.5)
        assert out.shape == (2, 8)


def test_rows_of_several_caches_go_on_together_once_they_are_the_bare_model_s(kind: str) -> None:
    """Where no pads stand between prompt and text: behind it the model is told no tasks, and knows no prompts."""
    bare, model, prompts = attached(kind)
    texts, caches_and_masks = torch.tensor([[6, 9, 12], [13, 8, 7]]), []
    for task, text in zip(("long", None), texts, strict=True):
        cache, mask = DynamicCache(), torch.ones(1, 3, dtype=torch.int64)
        with torch.no_grad():
            model(input_ids=text[None], attention_mask=mask, tasks=[task], past_key_values=cache, use_cache=True)
        mask = to_bare(cache, mask)
        assert (
            mask.tolist() == [[1] * (len(prompts[task]) + 3 if task else 3)] and cache.get_seq_length() == mask.shape[1]
        )
        caches_and_masks.append((cache, mask))
    (first, mask), (second, _) = caches_and_masks
    missing = mask.shape[1] - 3
    both = DynamicCache()
    for layer, (one, other) in enumerate(zip(first.layers, second.layers, strict=True)):
        pairs = (one.keys, other.keys), (one.values, other.values)
        both.update(*(torch.cat([a, functional.pad(b, (0, 0, missing, 0))]) for a, b in pairs), layer)
    remember(both, None)
    mask = torch.cat([mask, functional.pad(torch.ones(1, 3, dtype=torch.int64), (missing, 0))])
    mask = functional.pad(mask, (0, 1), value=1)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[5], [5]]), attention_mask=mask, past_key_values=both).logits
        for row, hard in enumerate((tiny.HARD["long"], [])):
            ids = torch.tensor([[*hard, *texts[row].tolist(), 5]])
            assert tiny.relative_error(found[row, -1], bare(ids).logits[0, -1]) < 1e-5


def test_a_cache_goes_on_with_its_task_when_another_one_is_removed() -> None:
    bare, model, prompts = attached("llama")
    ids = torch.tensor([[9, 8, 7]])
    with torch.no_grad():
        cache = model(ids, tasks=["short"], use_cache=True).past_key_values
    prompts.remove("long")  # the index of "short" was 1, and is that of "one" now
    ids = torch.cat([ids, torch.tensor([[5, 6]])], 1)
    with pytest.raises(SoftPromptError, match=r"filled for tasks \['short'\], the call names \['one'\]"):
        model.generate(ids, tasks=["one"], past_key_values=cache, max_new_tokens=1)
    out = model.generate(ids, tasks=["short"], past_key_values=cache, max_new_tokens=4, do_sample=False)
    row = tiny.Row(0, tiny.HARD["short"], ids[0].tolist())
    assert out[:, 5:].tolist() == tiny.hard_greedy(bare, row, 4, do_sample=False)


@pytest.mark.parametrize("tasks", [["long", "one"], None])
def test_a_cache_with_a_row_for_each_beam_goes_on(tasks: list[str] | None) -> None:
    bare, model, _ = attached("llama")
    ids = torch.tensor([[9, 8, 7, 6], [5, 4, 3, 2]])
    with torch.no_grad():
        cache = model(ids[:, :3], tasks=["long", "one"], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(SoftPromptError, match="filled for tasks"):
        model.generate(ids, tasks=["one", "long"], past_key_values=copy.deepcopy(cache), **options)
    out = model.generate(ids, tasks=tasks, past_key_values=cache, **options)
    for text, found, task in zip(ids.tolist(), out[:, 4:].tolist(), ("long", "one"), strict=True):
        assert [found] == tiny.hard_greedy(bare, tiny.Row(0, tiny.HARD[task], text), 4, do_sample=False, num_beams=2)

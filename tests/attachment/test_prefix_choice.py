"""When prompts are a prefix: not where it would not be exact, which is said once, and not where it would not pay."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens
from lightning_softprompt.attachment.call import Call
from lightning_softprompt.attachment.prefix_choice import PrefixPolicy
from lightning_softprompt.attachment.routing import TaskRows
from lightning_softprompt.base.traits import ModelTraits
from tests import tiny
from tests.attachment.helpers import assert_rows_equal, attached_copy, inputs, recompute_layers, widths
from tests.conformance import models


def test_rows_that_share_nothing_train_in_the_sequence() -> None:
    model, prompts = attached_copy(tiny.tiny_model(), "auto")
    seen, text = widths(model), torch.randint(2, 50, (3, 5))
    model(text, labels=text, task_ids=torch.tensor([0, 1, 2])).loss.backward()
    assert seen == [(3, 5 + max(prompts.lengths))]
    seen.clear()
    model(text, labels=text, task_ids=torch.tensor([-1, -1, -1])).loss.backward()
    assert seen == [(3, 5)]


def applies(model, prompts, rows: int, length: int, device: str, tasks: list[int]) -> bool:
    """Whether "auto" takes a prefix for a batch of equal rows on this device."""
    traits = ModelTraits.of(model)
    call = Call.of(traits, {"input_ids": torch.zeros(rows, length, dtype=torch.int64, device=device)})
    return PrefixPolicy(traits, prompts, "auto").applies(
        call, TaskRows.of(prompts, tuple(prompts.tasks[task] for task in tasks)), 0, False
    )


def test_on_a_gpu_a_prefix_has_to_save_half_of_the_columns_of_a_training_step() -> None:
    model = tiny.tiny_model()
    prompts = SoftPrompts.for_model(model, {"long": Tokens([5] * 10), "short": Tokens([6] * 5)})
    for device, expected in (("cpu", [True, True, True, False]), ("meta", [True, False, False, False])):
        # Columns saved, of all: 30 of 60, 30 of 64, 30 of 90, none of 30.
        cases = [(4, 5, [0] * 4), (4, 6, [0] * 4), (5, 10, [0, 0, 0, 0, -1]), (2, 5, [0, 1])]
        assert [applies(model, prompts, *case[:2], device, case[2]) for case in cases] == expected
        with torch.no_grad():  # prefixes are kept then, and computed once
            assert all(applies(model, prompts, *case[:2], device, case[2]) for case in cases)


def test_a_batch_of_frozen_prompts_is_no_reason_for_backward_to_fail() -> None:
    model, prompts = attached_copy(tiny.tiny_model(), "auto")
    prompts.freeze("long")
    text = torch.tensor([[9, 8, 7], [6, 5, 4]])
    model(text, labels=text, task_ids=torch.tensor([0, 0])).loss.backward()
    assert all(prompts[task].grad is None for task in prompts)


def test_a_model_that_takes_no_prefix(caplog: pytest.LogCaptureFixture) -> None:
    bare = MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2)).eval()
    with pytest.raises(SoftPromptError, match=r"prefix='always' cannot be had for MambaForCausalLM: it takes no"):
        attached_copy(bare)
    model, _ = attached_copy(bare, "auto")
    batch = tiny.random_batch(0, "right")
    with caplog.at_level(logging.WARNING, "lightning_softprompt"):
        for _ in range(2):
            assert_rows_equal(bare, batch, model(**inputs(batch)).logits)
    assert [record.message for record in caplog.records if "MambaForCausalLM" in record.message] == [
        "MambaForCausalLM: prompts go into the sequence of every row, and each row pays for its own: it takes no "
        "position_ids and cache"
    ]


def test_a_batch_that_takes_no_prefix(caplog: pytest.LogCaptureFixture) -> None:
    batch = tiny.random_batch(0, "right")
    model, _ = attached_copy(tiny.tiny_model())
    recompute_layers(model)
    with pytest.raises(SoftPromptError, match="cannot be had for LlamaForCausalLM: gradient checkpointing"):
        model(**inputs(batch, labels=True))
    model, _ = attached_copy(tiny.tiny_model(), "auto")
    recompute_layers(model)
    with caplog.at_level(logging.WARNING, "lightning_softprompt"):
        for _ in range(2):
            model(**inputs(batch, labels=True)).loss.backward()
    assert len(caplog.records) == 1 and "gradient checkpointing" in caplog.text


def mistral(window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=tiny.VOCABULARY, **sizes, num_key_value_heads=2, sliding_window=window, initializer_range=0.3,
        pad_token_id=1, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_a_window_that_cuts() -> None:
    bare = mistral(window=4)
    model, _ = attached_copy(bare, "auto")
    seen = widths(model)
    right, left = tiny.random_batch(0, "right"), tiny.random_batch(0, "left")
    length, longest = right.input_ids.shape[1], max(map(len, tiny.HARD.values()))
    with torch.no_grad():
        assert_rows_equal(bare, right, model(**inputs(right)).logits)
        assert seen[-1][1] == length, "no pads between prompt and text"
        assert_rows_equal(bare, left, model(**inputs(left)).logits)
        assert seen[-1][1] == length + longest, "in the sequence"
    ids = model.generate(**inputs(left), max_new_tokens=5, do_sample=False)
    for index, row in enumerate(left.rows):
        assert ids[index, length:].tolist() == tiny.hard_greedy(bare, row, 5, do_sample=False)[0]


def test_a_window_that_will_cut() -> None:
    bare = mistral(window=18)
    batch = tiny.random_batch(0, "left")
    length = batch.input_ids.shape[1]
    for new in (2, 8):  # within, and beyond
        model, _ = attached_copy(bare, "auto")
        seen = widths(model)
        ids = model.generate(**inputs(batch), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        assert (seen[0][0] == 3) == (new == 2), "the first pass is over three prompts, or over the rows"
        for index, row in enumerate(batch.rows):
            assert ids[index, length:].tolist() == tiny.hard_greedy(bare, row, new, do_sample=False)[0]
        seen.clear()
        with torch.no_grad():  # what a generation had to come is over with it
            model(**inputs(batch))
        assert seen[-1] == (len(batch.rows), length)
    model, _ = attached_copy(bare, "always")
    mask, cache, step = batch.attention_mask, None, batch.input_ids
    with torch.no_grad(), pytest.raises(SoftPromptError, match=r"looks back at 18 columns.*prefix='never'"):
        for _ in range(8):  # a loop of the user's own, which does not say where it ends
            tasks = batch.task_ids if cache is None else None
            out = model(step, attention_mask=mask, past_key_values=cache, task_ids=tasks)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(step)], 1)


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "bamba", "qwen3_next"])
@pytest.mark.parametrize("prefix", ["auto", "never"])
def test_pads_between_what_is_held_and_what_comes_are_refused_where_they_count(model_type: str, prefix: str) -> None:
    bare = models.build(model_type)
    model, _ = attached_copy(bare, prefix)
    ids, mask = torch.tensor([[9, 8, 7, 6], [1, 1, 1, 4]]), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    rows = [tiny.Row(0, tiny.HARD["short"], [9, 8, 7, 6]), tiny.Row(1, tiny.HARD["one"], [4])]
    tasks, options = ["short", "one"], {"max_new_tokens": 3, "do_sample": False}
    for size in (1, 2):  # the second row's text begins inside of a later chunk than its prompt
        with pytest.raises(SoftPromptError, match="pads stand inside of them, behind a prompt or an earlier text"):
            model.generate(ids, attention_mask=mask, tasks=tasks, prefill_chunk_size=size, **options)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, tasks=tasks, use_cache=True).past_key_values
    ids = torch.cat([ids, torch.tensor([[31, 32], [1, 33]])], 1)  # a second turn
    ragged, equal = (torch.cat([mask, torch.tensor([[1, 1], [first, 1]])], 1) for first in (0, 1))
    with pytest.raises(SoftPromptError, match="leave prefill_chunk_size out, give rows of equal length"):
        model.generate(ids, attention_mask=ragged, past_key_values=copy.deepcopy(cache), **options)
    out = model.generate(ids, attention_mask=equal, past_key_values=cache, **options)
    for row, found, new in zip(rows, out[:, 6:].tolist(), ([31, 32], [1, 33]), strict=True):
        assert found == tiny.hard_greedy(bare, tiny.Row(0, row.prompt, row.text + new), 3, do_sample=False)[0]

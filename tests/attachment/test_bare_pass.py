"""Calls whose rows have no prompt are the bare model's, in every form that Hugging Face's models are called in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    TopKLogitsWarper,
)

from lightning_softprompt import SoftPromptError, attach
from tests import tiny
from tests.attachment.helpers import attached, compiled_on_a_cpu, hard_prompts
from tests.conformance import models

TYPES = ("llama", "gpt2", "bloom", "gemma2", "opt", "mistral", "qwen2", "recurrent_gemma", "mamba", "rwkv", "xlnet")
WITH_KEYS = TYPES[:7]  # whose cache is one of keys and values alone
IDS = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 18, 19], [3, 30, 31, 32, 33]])
ROWS = len(IDS)
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
HOLES = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 1, 1], [1, 0, 0, 0, 1]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril().expand(ROWS, 1, 5, 5)


@cache
def pair(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A bare model and an attached copy of it."""
    bare = models.build(model_type)
    bare.generation_config.eos_token_id = None
    model = copy.deepcopy(bare)
    return bare, attach(model, hard_prompts(model))


def require_equal(found: Any, expected: Any) -> None:
    """The same structure, the same ids, and the same numbers but for rounding, which the place of weights decides."""
    if isinstance(expected, torch.Tensor) and expected.is_floating_point():
        assert found.shape == expected.shape and torch.equal(found.isfinite(), expected.isfinite())
        numbers = expected.isfinite()
        assert not numbers.any() or tiny.relative_error(found[numbers], expected[numbers]) < 1e-5
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected)
        require_equal(list(found.values()), list(expected.values()))
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert type(found) is type(expected) and len(found) == len(expected), found
        for mine, theirs in zip(found, expected, strict=True):
            require_equal(mine, theirs)
    else:
        assert type(found) is type(expected) and (found == expected or not isinstance(expected, str))


def require_as_bare(model_type: str, arguments: Callable[[PreTrainedModel], dict[str, Any]], method: str) -> None:
    """What the attached model answers, or raises, is what the bare one does."""
    bare, model = pair(model_type)

    def called(one: PreTrainedModel, **routing: Any) -> Any:
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                return getattr(one, method)(**arguments(one), **routing)
        except Exception as error:
            return type(error), str(error)

    require_equal(called(model, tasks=[None] * ROWS), called(bare))


FORWARD: dict[str, dict[str, Any]] = {
    "ids": {},
    "labels": {"labels": IDS},
    "holes in the mask": {"attention_mask": HOLES, "position_ids": torch.arange(5).expand(ROWS, -1)},
    "mask of four dimensions": {"attention_mask": CAUSAL},
    "packed positions": {"position_ids": torch.tensor([[0, 1, 0, 1, 2]] * ROWS)},
    "types of tokens": {"token_type_ids": torch.tensor([[4, 4, 7, 7, 7]] * ROWS)},
    "shifted labels": {"labels": IDS, "shift_labels": IDS.roll(-2, 1)},
    "layers by number": {"output_hidden_states": [1], "output_attentions": [0]},
    "hidden states and attentions": {"output_hidden_states": True, "output_attentions": True},
    "tuple": {"return_dict": False, "labels": IDS},
    "last logits": {"logits_to_keep": 2},
    "no cache": {"use_cache": False},
    "an argument that nobody knows": {"surprise": 1},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FORWARD)
@pytest.mark.parametrize("model_type", TYPES)
def test_a_forward_pass_is_the_bare_models(model_type: str, case: str) -> None:
    require_as_bare(model_type, lambda model: {"input_ids": IDS, **FORWARD[case]}, "__call__")


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "padded on the left": {"attention_mask": PADDED},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
    "beams, several answers": {"num_beams": 4, "num_return_sequences": 2},
    "beams, sampling": {"num_beams": 2, "do_sample": True},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "all outputs": {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
        "output_hidden_states": True,
    },
    "all outputs of padded rows": {"return_dict_in_generate": True, "output_scores": True, "attention_mask": PADDED},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "chunks of the prefill": {"prefill_chunk_size": 2},
    "guidance": {"guidance_scale": 1.5},
    "processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]], "min_new_tokens": 3},
    "a processor": {"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)]), "do_sample": True},
    "all columns": {"max_length": 9, "max_new_tokens": None},
    "compiled": {
        "cache_implementation": "static", "compile_config": compiled_on_a_cpu(),
    },
}  # fmt: skip


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "case"),
    [(each, case) for each in TYPES for case in GENERATE if each != "xlnet" or case != "padded on the left"],
)
def test_a_generation_is_the_bare_models(model_type: str, case: str) -> None:
    given = {"inputs": IDS, "attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 4}
    require_as_bare(model_type, lambda model: {**given, **copy.deepcopy(GENERATE[case])}, "generate")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 2}, {"assistant_early_exit": 1}], ids=["lookup", "early exit"]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_drafts_of_one_row_are_the_bare_models(model_type: str, options: dict[str, Any]) -> None:
    bare, model = pair(model_type)
    given = {"inputs": IDS[:1], "attention_mask": torch.ones(1, 5), "do_sample": False, "max_new_tokens": 6, **options}
    assert torch.equal(model.generate(**given, tasks=[None]), bare.generate(**given))


@pytest.mark.parametrize("model_type", WITH_KEYS)
def test_a_cache_goes_on_without_a_word_of_tasks(model_type: str) -> None:
    bare, model = pair(model_type)
    with torch.no_grad():
        expected = bare(IDS[:, 3:], past_key_values=bare(IDS[:, :3]).past_key_values).logits
        own = model(IDS[:, :3], tasks=[None] * ROWS).past_key_values
        require_equal(model(IDS[:, 3:], past_key_values=own).logits, expected)
        filled_by_bare = bare(IDS[:, :3]).past_key_values
        require_equal(model(IDS[:, 3:], past_key_values=filled_by_bare, tasks=[None] * ROWS).logits, expected)


def test_a_cache_without_prompts_takes_none() -> None:
    _, model = pair("llama")
    with torch.no_grad():
        filled = model(IDS, tasks=[None] * ROWS).past_key_values
        with pytest.raises(SoftPromptError, match="filled by rows without a prompt, the call names tasks"):
            model(IDS[:, :1], past_key_values=filled, tasks=["one"] * ROWS)
        with pytest.raises(SoftPromptError, match="filled by rows without a prompt, the call names tasks"):
            model.generate(torch.cat([IDS, IDS[:, :1]], 1), past_key_values=filled, tasks=["one"] * ROWS)


def test_a_cache_of_prompts_takes_no_other_tasks_in_generate() -> None:
    _, model = pair("llama")
    with torch.no_grad():
        filled = model(IDS, tasks=["one"] * ROWS).past_key_values
        with pytest.raises(SoftPromptError, match="the cache was filled for tasks"):
            model.generate(torch.cat([IDS, IDS[:, :1]], 1), past_key_values=filled, tasks=["short"] * ROWS)


@pytest.mark.parametrize("logits", ["all", "labels"])
def test_padded_rows_are_what_they_are_alone(kind: str, side: str, logits: str) -> None:
    """Learned positions count what is real, and nothing predicts a row's first token."""
    bare, model, _ = attached(kind, logits)
    batch = tiny.random_batch(5, side)
    with torch.no_grad():
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.input_ids, tasks=[None] * 6)
    total, count = 0.0, 0
    for index, row in enumerate(batch.rows):
        alone = bare(torch.tensor([row.text]), labels=torch.tensor([row.text]))
        total, count = total + float(alone.loss.detach()) * (len(row.text) - 1), count + len(row.text) - 1
        if logits == "all":
            found = out.logits[index, batch.start[index] : batch.start[index] + len(row.text)]
            assert tiny.relative_error(found, alone.logits.detach()[0]) < 1e-5
    assert float(out.loss) == pytest.approx(total / count, rel=1e-6)
    assert (out.logits is None) == (logits == "labels")


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "bart", "rwkv"])
def test_rows_of_a_model_that_reads_pads_are_moved_to_the_first_column(model_type: str) -> None:
    bare, model = pair(model_type)
    with torch.no_grad():
        found = model(IDS, attention_mask=PADDED, tasks=[None] * ROWS).logits
        for row, mask, mine in zip(IDS, PADDED, found, strict=True):
            assert tiny.relative_error(mine[mask == 1], bare(row[mask == 1][None]).logits[0]) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "ctrl", "xlnet"])
@pytest.mark.parametrize("by", ["input_ids", "inputs_embeds"])
def test_backward_has_nothing_to_do_and_does_not_fail(model_type: str, by: str) -> None:
    _, model = pair(model_type)
    text = IDS if by == "input_ids" else model.get_input_embeddings()(IDS).detach()
    model(**{by: text}, labels=IDS, tasks=[None] * ROWS).loss.backward()
    assert all(prompt.grad is None for prompt in model.soft_prompts.parameters())
    assert not any(p.grad is not None for p in model.parameters())


def test_a_cache_is_left_as_it_is() -> None:
    """Nothing is put in the way of code that looks into a cache or compiles it."""
    _, model = pair("llama")
    cache = DynamicCache()
    model(IDS, past_key_values=cache, tasks=[None] * ROWS)
    assert "get_seq_length" not in cache.__dict__ and cache.get_seq_length() == 5


@pytest.mark.parametrize("model_type", ["gpt2", "biogpt", "llama"])
def test_positions_behind_a_cache_follow_it_and_not_the_width_of_the_mask(model_type: str) -> None:
    bare, model = pair(model_type)
    mask = torch.zeros(ROWS, 12, dtype=torch.int64)
    mask[:, :5] = 1
    for given in ({"attention_mask": mask}, {}):
        caches = [StaticCache(config=one.config, max_cache_len=12) for one in (bare, model)]
        with torch.no_grad():
            expected = bare(IDS, past_key_values=caches[0], **given).logits
            require_equal(model(IDS, past_key_values=caches[1], tasks=[None] * ROWS, **given).logits, expected)


def test_rows_behind_pads_of_a_model_that_counts_columns_are_what_they_are_alone() -> None:
    bare, model = pair("biogpt")
    with torch.no_grad():
        found = model(IDS, attention_mask=PADDED, tasks=[None] * ROWS).logits
        for row, mask, mine in zip(IDS, PADDED, found, strict=True):
            assert tiny.relative_error(mine[mask == 1], bare(row[mask == 1][None]).logits[0]) < 1e-5


def test_no_pad_predicts_a_first_token_beside_a_loss_of_experts() -> None:
    bare, model = pair("mixtral")
    labels = IDS.masked_fill(PADDED == 0, -100)
    with torch.no_grad():
        given = {"attention_mask": PADDED, "output_router_logits": True}
        out = model(IDS, labels=labels, tasks=[None] * ROWS, **given)
        sums = [
            bare(row[mask == 1][None], labels=row[mask == 1][None]).loss * (mask.sum() - 1)
            for row, mask in zip(IDS, PADDED, strict=True)
        ]
        alone = float(sum(sums)) / int((PADDED.sum(1) - 1).sum())
        own = float(out.loss) - model.config.router_aux_loss_coef * float(out.aux_loss)
    assert own == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("logits", ["all", "labels"])
def test_arguments_of_the_loss_reach_it(kind: str, logits: str) -> None:
    bare, model, _ = attached(kind, logits)
    given = {"input_ids": IDS, "labels": IDS, "ignore_index": 17}
    with torch.no_grad():
        assert float(model(**given, tasks=[None] * ROWS).loss) == pytest.approx(float(bare(**given).loss), rel=1e-6)

"""`generate` of an attached model: new tokens are those of the bare model on each row alone, with hard tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import CompileConfig, GenerationConfig

from lightning_softprompt import SoftPromptError, detach
from tests import tiny
from tests.attachment.helpers import attached, attached_copy, compiled_on_a_cpu, generate
from tests.conformance import models
from tests.tokenizer import word_tokenizer

pytestmark = pytest.mark.usefixtures("route")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"repetition_penalty": 1.0, "min_new_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_generation_of_a_mixed_batch(kind: str, seed: int, options: dict) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(10 + seed, "left")
    found = generate(model, batch, max_new_tokens=9, do_sample=False, **options)
    options = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    expected = [ids for row in batch.rows for ids in tiny.hard_greedy(bare, row, 9, do_sample=False, **options)]
    assert found == expected


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str
)
def test_a_batch_padded_on_the_right_is_answered_as_on_the_left(kind: str, options: dict) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(14, "right")
    assert (batch.attention_mask[:, -1] == 0).any()
    given = (batch.input_ids.clone(), batch.attention_mask.clone())
    rows = {"attention_mask": batch.attention_mask, "task_ids": batch.task_ids}
    expected = [ids for row in batch.rows for ids in tiny.hard_greedy(bare, row, 6, do_sample=False, **options)]
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    width = batch.input_ids.shape[1]
    out = model.generate(input_ids=batch.input_ids, **rows, **options)
    assert out[:, width:].tolist() == expected
    for row, found in zip(batch.rows, out[:, :width].tolist(), strict=True):
        assert found == [1] * (width - len(row.text)) + row.text
    assert model.generate(batch.input_ids, **rows, **options).tolist() == out.tolist()
    embeds = model.get_input_embeddings()(batch.input_ids)
    assert model.generate(inputs_embeds=embeds, **rows, **options).tolist() == expected
    assert torch.equal(batch.input_ids, given[0]) and torch.equal(batch.attention_mask, given[1])


def test_positions_of_one_row_hold_for_all_that_are_padded_on_the_right() -> None:
    _, model, _ = attached("llama")
    ids, mask = torch.tensor([[9, 8, 7, 6], [5, 4, 1, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = {"attention_mask": mask, "tasks": ["long", "short"], "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **rows)
    for positions in (torch.arange(4)[None], torch.arange(4).expand(2, -1)):
        assert torch.equal(model.generate(ids, position_ids=positions, **rows), expected)


def test_pads_behind_a_text_that_goes_on_from_a_cache_are_refused() -> None:
    _, model, _ = attached("llama")
    first = model(torch.tensor([[9, 8], [7, 6]]), tasks=["long", "short"])
    ids, mask = torch.tensor([[9, 8, 5, 1], [7, 6, 5, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with pytest.raises(SoftPromptError, match="pad the rows on the left"):
        model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=2)


@pytest.mark.parametrize("repeat", [1, 3])
def test_sampling_with_a_fixed_seed(kind: str, repeat: int) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(13, "left")
    width = max(len(row.prompt + row.text) for row in batch.rows)
    hard = torch.stack(
        [functional.pad(torch.tensor(r.prompt + r.text), (width - len(r.prompt + r.text), 0)) for r in batch.rows]
    )
    mask = torch.stack(
        [functional.pad(torch.ones(len(r.prompt + r.text)), (width - len(r.prompt + r.text), 0)) for r in batch.rows]
    )
    options = dict(do_sample=True, top_k=20, temperature=0.8, max_new_tokens=8, num_return_sequences=repeat)
    torch.manual_seed(3)
    expected = bare.generate(hard, attention_mask=mask.long(), **options)[:, width:].tolist()
    torch.manual_seed(3)
    assert generate(model, batch, **options) == expected


def test_prompt_lookup_and_assisted_decoding(kind: str) -> None:
    bare, model, _ = attached(kind)
    assistant = tiny.tiny_model(kind, seed=5)
    for task, name in enumerate(tiny.TASKS):
        row = tiny.Row(task, tiny.HARD[name], [4, 9, 12, 4, 9, 12, 4, 9])
        ids = torch.tensor([row.text])
        expected = tiny.hard_greedy(bare, row, 12, do_sample=False)
        for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
            out = model.generate(ids, task_ids=torch.tensor([task]), max_new_tokens=12, do_sample=False, **options)
            assert out[:, ids.shape[1] :].tolist() == expected


def test_logits_processors_see_the_text_alone(kind: str) -> None:
    _, model, _ = attached(kind)
    batch = tiny.random_batch(14, "left")
    seen = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        return scores

    found = generate(model, batch, max_new_tokens=3, do_sample=False, logits_processor=[processor])
    assert torch.equal(seen[0], batch.input_ids)
    assert seen[-1][:, -2:].tolist() == [ids[:2] for ids in found]


def test_streamers_get_the_text_and_the_new_tokens(kind: str) -> None:
    bare, model, _ = attached(kind)
    seen: list[list[int]] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            seen.append(value.flatten().tolist())

        def end(self) -> None:
            seen.append([])

    row = tiny.Row(0, tiny.HARD["long"], [4, 9, 12])
    model.generate(torch.tensor([row.text]), tasks=["long"], max_new_tokens=4, do_sample=False, streamer=Streamer())
    (expected,) = tiny.hard_greedy(bare, row, 4, do_sample=False)
    assert seen == [row.text, *([token] for token in expected), []]


def test_lengths_of_a_generation_count_the_text_alone(kind: str) -> None:
    bare, model, _ = attached(kind)
    row = tiny.Row(0, tiny.HARD["long"], [4, 9, 12])
    (expected,) = tiny.hard_greedy(bare, row, 5, do_sample=False)
    ids = torch.tensor([row.text])
    assert model.generate(ids, tasks=["long"], max_length=8, do_sample=False)[0].tolist() == row.text + expected
    stopped = model.generate(ids, tasks=["long"], max_new_tokens=5, do_sample=False, eos_token_id=expected[2])
    assert stopped[0].tolist() == row.text + expected[: expected.index(expected[2]) + 1]


def test_generation_without_a_mask_takes_every_token_for_text(kind: str) -> None:
    bare, model, _ = attached(kind)
    bare.generation_config.pad_token_id = model.generation_config.pad_token_id = 4
    ids = torch.tensor([[4, 9, 4, 12]])
    out = model.generate(ids, task_ids=torch.tensor([0]), max_new_tokens=5, do_sample=False)
    row = tiny.Row(0, tiny.HARD["long"], [4, 9, 4, 12])
    assert out[:, 4:].tolist() == tiny.hard_greedy(bare, row, 5, do_sample=False)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_prompt_that_is_not_finite_is_refused(kind: str, value: float) -> None:
    """Logits would show it, tokens do not."""
    _, model, prompts = attached(kind)
    with torch.no_grad():
        prompts["short"][0, 0] = value
    batch = tiny.random_batch(0, "left")
    with pytest.raises(SoftPromptError, match="prompt of task 'short' holds a number that is not finite"):
        generate(model, batch, max_new_tokens=2)
    others = torch.tensor([task if task != 1 else 0 for task in batch.task_ids.tolist()])
    out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, task_ids=others, max_new_tokens=2)
    assert out.shape[1] == batch.input_ids.shape[1] + 2


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def require_compiled_as_alone(model, bare, batch: tiny.Batch, compiled: CompileConfig) -> None:
    found = generate(
        model, batch, max_new_tokens=6, do_sample=False, cache_implementation="static", compile_config=compiled
    )
    assert found == [tiny.hard_greedy(bare, row, 6, do_sample=False)[0] for row in batch.rows]


def batch_of(tasks: list[int], seed: int) -> tiny.Batch:
    """Ragged rows of these tasks, eight columns wide."""
    batch = tiny.random_batch(seed, "left", rows=len(tasks))
    batch.task_ids = torch.tensor(tasks)
    for row, task in zip(batch.rows, tasks, strict=True):
        row.task, row.prompt = task, tiny.HARD[tiny.TASKS[task]] if task >= 0 else []
    assert batch.input_ids.shape[1] == 8 and (batch.attention_mask == 0).any()
    return batch


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.compiles
def test_compiled_steps_are_one_graph_whatever_tasks_and_prompts(kind: str, fullgraph: bool) -> None:
    bare, model, prompts = attached(kind)
    compiled = compiled_on_a_cpu(fullgraph=fullgraph)
    require_compiled_as_alone(model, bare, batch_of([0, 1, 2, -1, 0, 1], 10), compiled)
    require_compiled_as_alone(model, bare, batch_of([2, 1, -1, 1, 1, 2], 12), compiled)  # none is as long as the first
    hard = [3, 4, 5, 6, 7, 30, 31]
    prompts["long"].data.copy_(model.get_input_embeddings().weight[hard])
    batch = batch_of([0, 0, 1, -1, 2, 0], 10)
    for row in batch.rows:
        row.prompt = hard if row.task == 0 else row.prompt
    require_compiled_as_alone(model, bare, batch, compiled)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own imports, torch 2.13
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.compiles
def test_steps_compiled_with_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch 2.13 takes what it compiled for other vector instructions (ATEN_CPU_CAPABILITY) out of its cache.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    bare, model, _ = attached("llama")
    for seed, tasks in ((10, [0, 1, 2, -1, 0, 1]), (12, [2, 1, -1, 1, 1, 2])):
        require_compiled_as_alone(model, bare, batch_of(tasks, seed), compiled_on_a_cpu("inductor"))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.compiles
def test_compiled_steps_of_recurrent_layers_are_one_graph() -> None:
    bare = models.build("bamba")
    model, _ = attached_copy(bare, "auto")
    for seed, tasks in ((10, [0, 1, 2, -1, 0, 1]), (12, [2, 1, -1, 1, 1, 2])):
        require_compiled_as_alone(model, bare, batch_of(tasks, seed), compiled_on_a_cpu())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_compiled_passes_are_refused_where_rows_begin_at_the_first_column() -> None:
    model, _ = attached_copy(models.build("bart"), "auto")
    rows = {"inputs": torch.tensor([[5, 6]]), "max_new_tokens": 2, "cache_implementation": "static"}
    with pytest.raises(SoftPromptError, match="BartForCausalLM that have prompts begin at the first column"):
        model.generate(**rows, tasks=["one"], compile_config=compiled_on_a_cpu())
    model.generate(**rows, tasks=["one"], compile_config=compiled_on_a_cpu(), disable_compile=True)
    model.generate(**rows, tasks=["one"])


def test_options_hold_wherever_they_are_given(kind: str) -> None:
    """By position, in a configuration, and in the model's own, which transformers merges in."""
    _, model, _ = attached(kind)
    ids = torch.tensor([[5, 6, 7]])
    guided = GenerationConfig(guidance_scale=2.0, max_new_tokens=2)
    with pytest.raises(SoftPromptError, match="guidance_scale=2"):
        model.generate(ids, guided, tasks=["one"])
    assert model.generate(ids, GenerationConfig(max_new_tokens=2), tasks=["one"]).shape == (1, 5)
    model.generation_config.guidance_scale = 2.0
    with pytest.raises(SoftPromptError, match="guidance_scale=2"):
        model.generate(ids, generation_config=GenerationConfig(max_new_tokens=2), tasks=["one"])


def test_token_healing_is_of_one_row(kind: str) -> None:
    _, model, _ = attached(kind)
    ids = torch.tensor([[5, 6, 7]])
    found = model.generate(ids, tasks=["one"], max_new_tokens=2, token_healing=True, tokenizer=word_tokenizer("abc"))
    assert found.shape[0] == 1
    for tasks in (["one", "one"], [None, None]):
        with pytest.raises(SoftPromptError, match="token_healing generates for one row after another"):
            model.generate(ids.expand(2, -1), tasks=tasks, max_new_tokens=2, token_healing=True)


def test_continuous_batching_is_refused_before_it_begins(kind: str) -> None:
    _, model, _ = attached(kind)
    for tasks in (["one"], [None]):
        with pytest.raises(SoftPromptError, match="continuous batching packs rows into one"):
            model.generate(torch.tensor([[5, 6]]), tasks=tasks, max_new_tokens=2, cache_implementation="paged")
    with pytest.raises(SoftPromptError, match="continuous batching packs rows into one"):
        model.generate_batch([[5, 6]])
    detach(model)
    assert "init_continuous_batching" not in vars(model)


def test_a_row_without_a_token_is_refused(kind: str) -> None:
    _, model, _ = attached(kind)
    with pytest.raises(SoftPromptError, match="row 1 has no token of text"):
        model.generate(torch.tensor([[5, 6], [7, 8]]), attention_mask=torch.tensor([[1, 1], [0, 0]]), tasks=["one"] * 2)

"""The hard-prompt oracle: a mixed, padded batch gives what each row gives alone, unpadded, with hard tokens."""

from __future__ import annotations

import copy
import functools
import gc
import sys

import pytest
import torch
from softprompt_kernels import prompt_concat, triton_concat
from torch.nn import functional
from transformers import (
    DynamicCache,
    GPT2ForSequenceClassification,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach, detach
from lightning_softprompt.attachment import forward_pass, prefix
from tests import tiny
from tests.kernels.devices import DEVICES

KINDS = ["llama", "gpt2"]
SIDES = ["left", "right"]
SEEDS = [0, 1, 2]
PREFIX = "auto"


@pytest.fixture(params=["auto", "never"], autouse=True)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds for prompts as a prefix, where the batch allows it, and for prompts in the sequence."""
    monkeypatch.setattr(sys.modules[__name__], "PREFIX", request.param)
    return request.param


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> str:
    return request.param


def attached(kind: str, logits: str = "all", seed: int = 0):
    """The bare model, and an attached copy."""
    bare = tiny.tiny_model(kind, seed)
    model = copy.deepcopy(bare)
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()})
    return bare, attach(model, prompts, prefix=PREFIX, logits=logits), prompts


def assert_rows_equal(bare, batch: tiny.Batch, logits: torch.Tensor) -> None:
    assert logits.shape[:2] == batch.input_ids.shape
    for index, row in enumerate(batch.rows):
        expected = tiny.hard_row(bare, row)
        found = logits[index, batch.start[index] : batch.start[index] + len(row.text)]
        assert tiny.relative_error(found, expected) < 1e-5, (index, row)


def mean_loss_of_rows(bare, batch: tiny.Batch) -> float:
    """Mean over all scored tokens of all rows, each row run alone."""
    total, count = 0.0, 0
    for row in batch.rows:
        ids = torch.tensor([row.prompt + row.text])
        with torch.no_grad():
            logits = bare(ids).logits[0].double()
        first = max(len(row.prompt), 1)
        for position in range(first, ids.shape[1]):
            total += float(functional.cross_entropy(logits[position - 1], ids[0, position]))
            count += 1
    return total / count


@pytest.mark.parametrize("device", DEVICES)
def test_the_triton_kernel_lays_out_an_attached_model(kind: str, side: str, device: str, monkeypatch) -> None:
    results = []
    for backend in ("reference", "triton"):
        with monkeypatch.context() as patch:
            _, model, prompts = attached(kind)
            model.to(device)
            if device == "cpu" or backend == "reference":
                # On a GPU "auto" has to choose Triton by itself.
                for room in (forward_pass, prefix):
                    patch.setattr(room, "prompt_concat", functools.partial(prompt_concat, backend=backend))
            batch = tiny.random_batch(0, side)
            rows = dict(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                task_ids=batch.task_ids.to(device),
            )
            calls = triton_calls(patch)
            out = model(**rows, labels=batch.labels.to(device))
            out.loss.backward()
            ids = model.generate(**rows, max_new_tokens=3) if side == "left" else rows["input_ids"]
            assert bool(calls) == (backend == "triton")
            results.append((out.logits, out.loss, ids, *(prompts[task].grad for task in prompts.tasks)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def triton_calls(monkeypatch) -> list[int]:
    """Grows with every launch of the layout's kernel."""
    calls: list[int] = []
    concat = triton_concat.concat

    def counted(*arguments):
        calls.append(len(calls))
        return concat(*arguments)

    monkeypatch.setattr(triton_concat, "concat", counted)
    return calls


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_loss_of_a_mixed_batch(kind: str, side: str, seed: int) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(seed, side)
    with torch.no_grad():
        out = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            task_ids=batch.task_ids,
        )
    assert_rows_equal(bare, batch, out.logits)
    assert float(out.loss) == pytest.approx(mean_loss_of_rows(bare, batch), rel=1e-6)


def test_labels_at_pads_do_not_count(kind: str, side: str) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(3, side)
    with torch.no_grad():
        loss = (
            model(batch.input_ids, batch.attention_mask, labels=batch.input_ids, task_ids=batch.task_ids).loss
            if kind == "llama"
            else model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.input_ids,
                task_ids=batch.task_ids,
            ).loss
        )
    assert float(loss) == pytest.approx(mean_loss_of_rows(bare, batch), rel=1e-6)


def test_no_mask_is_all_ones(kind: str) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(4, "left", ragged=False)
    with torch.no_grad():
        assert_rows_equal(bare, batch, model(batch.input_ids, task_ids=batch.task_ids).logits)


def test_names_and_task_ids_route_alike(kind: str) -> None:
    _, model, prompts = attached(kind)
    batch = tiny.random_batch(5, "left")
    names = [prompts.tasks[i] if i >= 0 else None for i in batch.task_ids.tolist()]
    with torch.no_grad():
        by_id = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids).logits
        for other in ({"tasks": names}, {"task_ids": names}, {"task_ids": batch.task_ids.tolist()}):
            found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **other).logits
            assert torch.equal(by_id, found)


@pytest.mark.parametrize("keep", [1, 3, 50, torch.tensor([0, 2]), torch.tensor([-1])])
def test_logits_to_keep(kind: str, side: str, keep) -> None:
    _, model, _ = attached(kind)
    batch = tiny.random_batch(6, side)
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with torch.no_grad():
        full = model(**arguments).logits
        kept = model(**arguments, logits_to_keep=keep).logits
    expected = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)


def test_hidden_states_attentions_and_tuples_have_the_columns_of_the_input(kind: str, side: str) -> None:
    bare, model, _ = attached(kind)
    model.set_attn_implementation("eager")
    batch = tiny.random_batch(7, side)
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with torch.no_grad():
        out = model(**arguments, output_hidden_states=True, output_attentions=True)
        as_tuple = model(**arguments, return_dict=False)
        for index, row in enumerate(batch.rows):
            alone = bare(torch.tensor([row.prompt + row.text]), output_hidden_states=True)
            begin = batch.start[index]
            for found, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
                mine = found[index, begin : begin + len(row.text)]
                assert tiny.relative_error(mine, expected[0, len(row.prompt) :]) < 1e-5
    assert all(w.shape[2] == batch.input_ids.shape[1] for w in out.attentions)
    assert torch.equal(as_tuple[0], out.logits)


def test_gradients_are_those_of_the_rows_alone(kind: str, side: str) -> None:
    bare, model, prompts = attached(kind)
    bare.double()
    batch = tiny.random_batch(8, side)
    model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        task_ids=batch.task_ids,
    ).loss.backward()
    table = bare.get_input_embeddings()
    leaves = {t: table(torch.tensor(tiny.HARD[n])).detach().requires_grad_() for t, n in enumerate(tiny.TASKS)}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in batch.rows:
        text = table(torch.tensor(row.text)).detach()
        embeds = torch.cat([leaves[row.task], text]) if row.task >= 0 else text
        logits = bare(inputs_embeds=embeds[None]).logits[0]
        targets = torch.tensor(row.prompt + row.text)
        first = max(len(row.prompt), 1)
        total = total + functional.cross_entropy(logits[first - 1 : -1], targets[first:], reduction="sum")
        count += len(targets) - first
    (total / count).backward()
    for index, task in enumerate(tiny.TASKS):
        assert tiny.relative_error(prompts[task].grad.double(), leaves[index].grad) < 1e-5
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("soft_prompts."))


def test_logits_labels_gives_the_same_loss_and_gradient_without_logits(kind: str, side: str) -> None:
    batch = tiny.random_batch(9, side)
    labels = batch.labels.clone()
    labels[:, ::2] = -100
    results = []
    for logits in ("all", "labels"):
        _, model, prompts = attached(kind, logits=logits)
        out = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels,
            task_ids=batch.task_ids,
        )
        out.loss.backward()
        results.append((out, {task: prompts[task].grad for task in prompts.tasks}))
    (full, gradients), (scored, gradients_scored) = results
    assert scored.logits is None and full.logits is not None
    torch.testing.assert_close(scored.loss, full.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients_scored, gradients, rtol=1e-4, atol=1e-6)
    assert (
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids).logits
        is not None
    )


def generate(model, batch: tiny.Batch, **options: object) -> list[list[int]]:
    out = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids, **options
    )
    times = out.shape[0] // len(batch.rows)
    assert torch.equal(out[:, : batch.input_ids.shape[1]], batch.input_ids.repeat_interleave(times, 0))
    return out[:, batch.input_ids.shape[1] :].tolist()


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


def test_nothing_of_a_step_or_a_generation_outlives_it(kind: str) -> None:
    # A cycle would hold keys, values and the graph behind them until Python collects its garbage.
    _, model, _ = attached(kind)
    batch = tiny.random_batch(0, "left")
    rows = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)

    def train() -> None:
        model(**rows, labels=batch.labels).loss.backward()

    def generate() -> None:
        model.generate(**rows, max_new_tokens=2, do_sample=False)

    for call in (train, generate):
        call()
        gc.collect()
        gc.disable()
        try:
            before = tensors_alive()
            call()
            assert tensors_alive() == before, call.__name__
        finally:
            gc.enable()


def tensors_alive() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_generation_without_a_mask_takes_every_token_for_text(kind: str) -> None:
    bare, model, _ = attached(kind)
    bare.generation_config.pad_token_id = model.generation_config.pad_token_id = 4
    ids = torch.tensor([[4, 9, 4, 12]])
    out = model.generate(ids, task_ids=torch.tensor([0]), max_new_tokens=5, do_sample=False)
    row = tiny.Row(0, tiny.HARD["long"], [4, 9, 4, 12])
    assert out[:, 4:].tolist() == tiny.hard_greedy(bare, row, 5, do_sample=False)


def test_embeddings_in_place_of_ids(kind: str) -> None:
    _, model, _ = attached(kind)
    batch = tiny.random_batch(17, "left")
    embeds = model.get_input_embeddings()(batch.input_ids)
    arguments = dict(attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with torch.no_grad():
        by_id = model(input_ids=batch.input_ids, **arguments).logits
        assert torch.equal(model(inputs_embeds=embeds, **arguments).logits, by_id)
    by_id = model.generate(input_ids=batch.input_ids, max_new_tokens=5, do_sample=False, **arguments)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, **arguments)
    assert torch.equal(out, by_id[:, batch.input_ids.shape[1] :])


def test_own_positions_are_shifted_by_the_prompt(kind: str, side: str) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(18, side)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0) + 2
    with torch.no_grad():
        out = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=positions,
            task_ids=batch.task_ids,
        )
        for index, row in enumerate(batch.rows):
            ids = torch.tensor([row.prompt + row.text])
            places = [*range(len(row.prompt)), *(len(row.prompt) + 2 + i for i in range(len(row.text)))]
            expected = bare(ids, position_ids=torch.tensor([places])).logits[0, len(row.prompt) :]
            begin = batch.start[index]
            assert tiny.relative_error(out.logits[index, begin : begin + len(row.text)], expected) < 1e-5


def test_bfloat16_base(kind: str, side: str) -> None:
    bare, model, prompts = attached(kind)
    bare.bfloat16()
    model.bfloat16()
    assert all(prompts[task].dtype == torch.float32 for task in prompts)
    batch = tiny.random_batch(19, side)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids).logits
    assert logits.dtype == torch.bfloat16
    # Sums in another order, each rounded to 8 bits: as far from the truth as the bare model's own are.
    truth = [tiny.hard_row(copy.deepcopy(bare).float(), row) for row in batch.rows]
    alone = [tiny.hard_row(bare, row).float() for row in batch.rows]
    mixed = [
        logits[index, start : start + len(row.text)].float()
        for index, (row, start) in enumerate(zip(batch.rows, batch.start, strict=True))
    ]
    errors = [tiny.relative_error(torch.cat(found), torch.cat(truth)) for found in (mixed, alone)]
    assert errors[0] < 2 * errors[1]


def test_detach_leaves_no_trace(kind: str) -> None:
    model = tiny.tiny_model(kind)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.train()
    bare = copy.deepcopy(model)
    names = set(model.__dict__), list(model.state_dict()), [n for n, _ in model.named_modules()]
    hooks = {n: _hooks(m) for n, m in model.named_modules()}
    prompts = SoftPrompts.for_model(model, {"a": 3, "b": 2})
    assert attach(model, prompts) is model
    assert type(model) is type(bare) and list(model.state_dict()) == names[1]
    assert not any(m.training for m in model.modules() if m is not prompts)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "soft_prompts.prompt:a",
        "soft_prompts.prompt:b",
    ]
    batch = tiny.random_batch(20, "left")
    model.generate(batch.input_ids, attention_mask=batch.attention_mask, tasks=["a"] * 6, max_new_tokens=2)
    assert detach(model) is model
    assert (set(model.__dict__), list(model.state_dict()), [n for n, _ in model.named_modules()]) == names
    assert {n: _hooks(m) for n, m in model.named_modules()} == hooks
    for (name, found), (_, expected) in zip(model.named_parameters(), bare.named_parameters(), strict=True):
        assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad, name
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(batch.input_ids).logits, bare.eval()(batch.input_ids).logits)
    with pytest.raises(SoftPromptError, match="nothing to detach"):
        detach(model)


def _hooks(module: torch.nn.Module) -> tuple[int, ...]:
    return tuple(
        len(getattr(module, name))
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_state_dict_hooks",
            "_load_state_dict_post_hooks",
        )
    )


def test_an_attached_model_saves_and_loads_the_bare_state(kind: str, tmp_path) -> None:
    bare, model, _ = attached(kind)
    model.load_state_dict(bare.state_dict())
    model.save_pretrained(tmp_path)
    again = type(bare).from_pretrained(tmp_path)
    for name, value in bare.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_deep_copy_is_attached_for_itself(kind: str) -> None:
    _, model, prompts = attached(kind)
    batch = tiny.random_batch(21, "left")
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with torch.no_grad():
        expected = model(**arguments).logits
        twin = copy.deepcopy(model)
        prompts["long"].zero_()
        assert torch.equal(twin(**arguments).logits, expected)
    assert torch.equal(twin.generate(**arguments, max_new_tokens=2)[:, :2], batch.input_ids[:, :2])
    assert twin.generate.__self__.model is twin


def test_one_task_needs_no_routing_and_several_do(kind: str) -> None:
    model = tiny.tiny_model(kind)
    attach(model, SoftPrompts.for_model(model, {"only": 3}))
    ids = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, tasks=["only", "only"]).logits)
    detach(model)
    attach(model, SoftPrompts.for_model(model, {"a": 3, "b": 2}))
    with pytest.raises(SoftPromptError, match=r"2 tasks .* which row is which; pass task_ids"):
        model(ids)
    with pytest.raises(SoftPromptError, match=r"2 tasks .* which row is which"):
        model.generate(ids, max_new_tokens=1)
    # A refused call leaves nothing behind.
    assert model(ids, task_ids=torch.tensor([0, -1])).logits.shape[:2] == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_ids": torch.tensor([0, 3])}, "task id 3 is out of range.*0: 'long'"),
        ({"tasks": ["long", "nope"]}, "unknown task 'nope'; known tasks: 'long', 'short', 'one'"),
        ({"tasks": ["long"]}, "1 tasks were given for 2 rows"),
        ({"tasks": "long"}, "a list with one task a row"),
        ({"task_ids": torch.tensor([0.0, 1.0])}, "must be an integer tensor"),
        ({"tasks": ["long"] * 2, "attention_mask": torch.ones(2, 1, 3, 3)}, "four dimensions and packed"),
        ({"tasks": ["long"] * 2, "attention_mask": torch.ones(2, 5)}, r"attention_mask must be \[2, 3\]"),
        ({"tasks": ["long"] * 2, "position_ids": torch.tensor([[0, 1, 0]] * 2)}, "restart inside a row"),
        ({"tasks": ["long"] * 2, "token_type_ids": torch.zeros(2, 3, dtype=torch.int64)}, "token_type_ids"),
        ({"tasks": ["long"] * 2, "labels": torch.zeros(2, 2, dtype=torch.int64)}, r"labels must be \[2, 3\]"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_wrong_calls_are_refused_by_name(arguments: dict, message: str) -> None:
    _, model, _ = attached("gpt2")
    with pytest.raises(SoftPromptError, match=message):
        model(torch.tensor([[5, 6, 7], [8, 9, 10]]), **arguments)


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


def test_models_without_a_causal_head_are_refused() -> None:
    prompts = SoftPrompts(hidden_size=32)
    config = tiny.tiny_model("gpt2").config
    with pytest.raises(SoftPromptError, match="no language-modelling head; load the model with AutoModelForCausalLM"):
        attach(GPT2ForSequenceClassification(config), prompts)
    tiny_t5 = T5Config(vocab_size=10, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
    with pytest.raises(SoftPromptError, match="encoder-decoder"):
        attach(T5ForConditionalGeneration(tiny_t5), prompts)
    with pytest.raises(SoftPromptError, match="needs a transformers PreTrainedModel, got Linear"):
        attach(torch.nn.Linear(1, 1), prompts)


def test_prompts_of_another_base_are_refused(kind: str) -> None:
    model, other = tiny.tiny_model(kind, seed=0), tiny.tiny_model(kind, seed=1)
    prompts = SoftPrompts.for_model(other, {"a": 3})
    with pytest.raises(SoftPromptError, match="made for another base model"):
        attach(model, prompts)
    prompts.base = None
    attach(model, prompts)
    with pytest.raises(SoftPromptError, match="attached already; call detach"):
        attach(model, prompts)
    detach(model)
    narrow = SoftPrompts(hidden_size=8)
    narrow.add("a", torch.zeros(2, 8))
    with pytest.raises(SoftPromptError, match="8 wide"):
        attach(model, narrow)
    for arguments in ({"prefix": "x"}, {"prefix": True}, {"logits": "none"}):
        with pytest.raises(SoftPromptError, match=next(iter(arguments))):
            attach(model, SoftPrompts.for_model(model, {"a": 3}), **arguments)


def test_a_bfloat16_copy_of_the_base_is_the_same_base(kind: str) -> None:
    model = tiny.tiny_model(kind)
    prompts = SoftPrompts.for_model(model, {"a": 3})
    model.bfloat16().resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    attach(model, prompts)


def test_absent_tasks_get_no_gradient(kind: str) -> None:
    _, model, prompts = attached(kind)
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]), tasks=["short"]).loss.backward()
    assert prompts["short"].grad is not None
    assert prompts["long"].grad is None and prompts["one"].grad is None


def test_as_many_tasks_as_rows_also_in_generate(kind: str) -> None:
    _, model, _ = attached(kind)
    ids = torch.tensor([[5, 6]] * 4)
    for routing in ({"tasks": ["long", "one"]}, {"task_ids": torch.tensor([0])}):
        with pytest.raises(SoftPromptError, match="tasks were given for 4 rows"):
            model.generate(ids, max_new_tokens=1, **routing)
    for call in (model, model.generate):
        with pytest.raises(SoftPromptError, match="both task_ids and tasks are given"):
            call(input_ids=ids, tasks=["long"] * 4, task_ids=torch.tensor([0] * 4))
    with pytest.raises(SoftPromptError, match=r"guidance_scale=1\.5 compares"):
        model.generate(ids, tasks=["long"] * 4, guidance_scale=1.5, max_new_tokens=1)
    with pytest.raises(SoftPromptError, match="no columns"):
        model(ids[:, :0], tasks=["long"] * 4)


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


def test_an_interrupted_pass_leaves_nothing_behind(kind: str) -> None:
    _, model, _ = attached(kind)
    batch = tiny.random_batch(23, "left")
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    other = torch.randint(2, tiny.VOCABULARY, (6, batch.input_ids.shape[1] + 7))
    with torch.no_grad():
        expected = model(other, task_ids=torch.full((6,), -1)).logits

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        handle = model.get_input_embeddings().register_forward_pre_hook(
            lambda *_: interrupt() if model.soft_prompt_attachment._pass else None
        )
        with pytest.raises(KeyboardInterrupt):
            model(**arguments)
        handle.remove()
        assert torch.equal(model(other, task_ids=torch.full((6,), -1)).logits, expected)


def test_rows_without_a_prompt_alone_can_be_trained_on(kind: str) -> None:
    _, model, prompts = attached(kind)
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]), tasks=[None]).loss.backward()
    assert all(prompts[task].grad is None for task in prompts)


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
    found = model.generate(ids, tasks=["short"] * 2, use_cache=False, **options)
    for row, new in zip(ids.tolist(), found[:, 3:].tolist(), strict=True):
        hard = torch.tensor([tiny.HARD["short"] + row])
        assert bare.generate(hard, use_cache=False, **options)[0, -4:].tolist() == new
    with pytest.raises(SoftPromptError, match="generate with use_cache=False"):
        model.generate(ids, tasks=["short"] * 2, **options)


def test_roberta_counts_positions_from_its_padding_index() -> None:
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=True,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=1,
        eos_token_id=None,
        bos_token_id=0,
    )
    bare = RobertaForCausalLM(config).eval()
    model = copy.deepcopy(bare)
    attach(model, SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()}))
    batch = tiny.random_batch(25, "left")
    with torch.no_grad():
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    assert_rows_equal(bare, batch, out.logits)
    found = generate(model, batch, max_new_tokens=5, do_sample=False)
    assert found == [ids for row in batch.rows for ids in tiny.hard_greedy(bare, row, 5, do_sample=False)]


def test_the_base_stays_in_eval_mode(kind: str) -> None:
    _, model, _ = attached(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = tiny.random_batch(26, "left")
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with torch.no_grad():
        expected = model(**arguments).logits
        model.train()
        assert torch.equal(model(**arguments).logits, expected)
    assert not any(module.training for module in model.modules())


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

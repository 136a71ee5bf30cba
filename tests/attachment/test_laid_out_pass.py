"""The hard-prompt oracle: a mixed, padded batch gives what each row gives alone, unpadded, with hard tokens."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from softprompt_kernels import prompt_concat, triton_concat
from torch.nn import functional

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from lightning_softprompt.attachment import layout, prefix
from tests import tiny
from tests.attachment.helpers import assert_rows_equal, attached, generate, mean_loss_of_rows
from tests.kernels.devices import DEVICES

SEEDS = [0, 1, 2]


pytestmark = pytest.mark.usefixtures("route")


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


def test_no_mask_is_all_ones(kind: str) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(4, "left", ragged=False)
    with torch.no_grad():
        assert_rows_equal(bare, batch, model(batch.input_ids, task_ids=batch.task_ids).logits)


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


def test_absent_tasks_get_no_gradient(kind: str) -> None:
    _, model, prompts = attached(kind)
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]), tasks=["short"]).loss.backward()
    assert prompts["short"].grad is not None
    assert prompts["long"].grad is None and prompts["one"].grad is None


def test_rows_without_a_prompt_alone_can_be_trained_on(kind: str) -> None:
    _, model, prompts = attached(kind)
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]), tasks=[None]).loss.backward()
    assert all(prompts[task].grad is None for task in prompts)


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


def test_the_head_multiplies_one_matrix_and_not_one_of_each_row(kind: str) -> None:
    _, model, _ = attached(kind)
    batch, seen = tiny.random_batch(6, "left"), []
    model.lm_head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids, logits_to_keep=2)
    assert seen[-1].shape[:2] == (6, 2) and seen[-1].is_contiguous()


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


@pytest.mark.parametrize("device", DEVICES)
def test_the_triton_kernel_lays_out_an_attached_model(kind: str, side: str, device: str, monkeypatch) -> None:
    results = []
    for backend in ("reference", "triton"):
        with monkeypatch.context() as patch:
            _, model, prompts = attached(kind)
            model.to(device)
            if device == "cpu" or backend == "reference":
                # On a GPU "auto" has to choose Triton by itself.
                for room in (layout, prefix):
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


def test_a_pad_token_beyond_the_embedding_does_no_harm(kind: str, side: str) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(5, side)
    ids = batch.input_ids.masked_fill(batch.attention_mask == 0, tiny.VOCABULARY)
    for pads in (ids, ids.masked_fill(batch.attention_mask == 0, -100)):
        out = model(pads, attention_mask=batch.attention_mask, labels=batch.labels, task_ids=batch.task_ids)
        assert_rows_equal(bare, batch, out.logits)


def test_rows_longer_than_the_table_of_positions_are_refused(side: str) -> None:
    _, model, prompts = attached("gpt2")
    table, prompt = model.config.n_positions, len(prompts["long"])
    text = torch.full((2, table - prompt), 9)
    padded = functional.pad(text, (9, 0) if side == "left" else (0, 9), value=1)
    mask = functional.pad(torch.ones_like(text), (9, 0) if side == "left" else (0, 9))
    with torch.no_grad():
        full = model(text, tasks=["long", None]).logits  # its positions are all taken
        found = model(padded, attention_mask=mask, tasks=["long", None]).logits[mask == 1].view_as(full)
        assert tiny.relative_error(found, full) < 1e-5
        with pytest.raises(SoftPromptError, match=f"has {table + 1} tokens, .*GPT2LMHeadModel has {table} positions"):
            model(functional.pad(text, (0, 1), value=9), tasks=["long", None])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_prompt_that_is_not_finite_touches_no_other_row(kind: str, value: float, with_gradients: bool) -> None:
    bare, model, prompts = attached(kind)
    if value == 1e6:  # too large for these
        bare, model = bare.half(), model.half()
    with torch.no_grad():
        prompts["long"].fill_(value)
    batch = tiny.random_batch(3, "left", rows=12)
    with torch.set_grad_enabled(with_gradients):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids).logits.detach()
    for index, row in enumerate(batch.rows):
        found = logits[index, batch.start[index] :]
        if row.task == 0:
            assert not found.isfinite().all()
        else:
            bound = 1e-5 if value != 1e6 else 0.1  # of half precision
            assert tiny.relative_error(found, tiny.hard_row(bare, row)) < bound

"""Prompts as a prefix: the same as in the sequence, kept for as long as it is true, and left where it would not be."""

from __future__ import annotations

import copy
import logging
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from lightning_softprompt.attachment.attach import attachment_of
from tests import tiny


def attached(bare: PreTrainedModel, prefix: str = "always", logits: str = "all") -> tuple[PreTrainedModel, SoftPrompts]:
    model = copy.deepcopy(bare)
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()})
    return attach(model, prompts, prefix=prefix, logits=logits), prompts


def inputs(batch: tiny.Batch, labels: bool = False) -> dict[str, Tensor]:
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "task_ids": batch.task_ids}
    return {**rows, "labels": batch.labels} if labels else rows


def mistral(window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=tiny.VOCABULARY, **sizes, num_key_value_heads=2, sliding_window=window, initializer_range=0.3,
        pad_token_id=1, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def widths(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Grows by the rows and columns of every pass through the first layer."""
    seen: list[tuple[int, int]] = []
    layer = model.model.layers[0] if hasattr(model, "model") else model.transformer.h[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    return seen


def require_rows(bare: PreTrainedModel, batch: tiny.Batch, logits: Tensor) -> None:
    for index, row in enumerate(batch.rows):
        found = logits.detach()[index, batch.start[index] : batch.start[index] + len(row.text)]
        assert tiny.relative_error(found, tiny.hard_row(bare, row)) < 1e-5


@pytest.mark.parametrize("logits", ["all", "labels"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_same_loss_and_gradients_as_in_the_sequence(kind: str, side: str, logits: str) -> None:
    bare = tiny.tiny_model(kind)
    (shared, mine), (inline, theirs) = attached(bare, "always", logits), attached(bare, "never", logits)
    for seed in range(3):
        batch = tiny.random_batch(seed, side, rows=8)
        batch.labels[seed, : batch.start[seed] + 2] = -100
        losses = []
        for model, prompts in ((shared, mine), (inline, theirs)):
            prompts.zero_grad()
            out = model(**inputs(batch, labels=True), output_hidden_states=True)
            out.loss.backward()
            assert (out.logits is None) == (logits == "labels")
            assert all(states.shape[:2] == batch.input_ids.shape for states in out.hidden_states)
            losses.append(out.loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for task in mine:
            assert tiny.relative_error(mine[task].grad, theirs[task].grad) < 1e-5


def test_a_loss_over_a_given_number_of_items() -> None:
    batch, losses = tiny.random_batch(0, "right"), []
    for prefix in ("always", "never"):
        for logits in ("all", "labels"):
            model, _ = attached(tiny.tiny_model(), prefix, logits)
            losses.append(model(**inputs(batch, labels=True), num_items_in_batch=7).loss.item())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_every_task_is_computed_once_a_step_in_training_and_once_for_all_in_inference() -> None:
    model, prompts = attached(tiny.tiny_model(), "auto")
    seen, batch = widths(model), tiny.random_batch(0, "right", rows=8)
    rows, length = batch.input_ids.shape
    tasks, longest = 3, max(prompts.lengths)
    for _ in range(2):
        model(**inputs(batch, labels=True)).loss.backward()
    assert seen == [(tasks, longest), (rows, length)] * 2
    seen.clear()
    with torch.no_grad():
        for _ in range(2):
            model(**inputs(batch))
    assert seen == [(tasks, longest), (rows, length), (rows, length)]
    seen.clear()
    model.generate(**inputs(batch), max_new_tokens=3, min_new_tokens=3)
    assert seen == [(rows, length), (rows, 1), (rows, 1)]


def test_rows_that_share_nothing_train_in_the_sequence() -> None:
    model, prompts = attached(tiny.tiny_model(), "auto")
    seen, text = widths(model), torch.randint(2, 50, (3, 5))
    model(text, labels=text, task_ids=torch.tensor([0, 1, 2])).loss.backward()
    assert seen == [(3, 5 + max(prompts.lengths))]
    seen.clear()
    model(text, labels=text, task_ids=torch.tensor([-1, -1, -1])).loss.backward()
    assert seen == [(3, 5)]


def test_only_scored_positions_reach_the_head() -> None:
    for prefix in ("always", "never"):
        model, _ = attached(tiny.tiny_model(), prefix, "labels")
        reached: list[int] = []
        model.lm_head.register_forward_hook(
            lambda head, args, out, reached=reached: reached.append(out.shape[:-1].numel())
        )
        batch = tiny.random_batch(0, "right")
        last = batch.attention_mask.sum(1) - 1
        labels = torch.full_like(batch.labels, -100).scatter(1, last[:, None], 7)
        model(**inputs(batch), labels=labels).loss.backward()
        assert reached == ([3, len(batch.rows)] if prefix == "always" else [len(batch.rows)])


CHANGES: dict[str, Any] = {
    "the prompt's data": lambda model, prompts: prompts["long"].data.mul_(1.5),
    "the prompt in place": lambda model, prompts: prompts["long"].detach().add_(0.5),
    "a weight in place": lambda model, prompts: model.model.layers[1].mlp.up_proj.weight.detach().mul_(1.5),
    "a loaded state": lambda model, prompts: model.load_state_dict(tiny.tiny_model(seed=3).state_dict()),
    "another weight": lambda model, prompts: setattr(
        model.model.layers[1].mlp, "up_proj", copy.deepcopy(model.model.layers[0].mlp.up_proj)
    ),
    "the dtype": lambda model, prompts: model.double(),
    "the embedding": lambda model, prompts: model.resize_token_embeddings(tiny.VOCABULARY + 1, mean_resizing=False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_kept_is_dropped_with_what_it_was_computed_from(what: str) -> None:
    model, prompts = attached(tiny.tiny_model())
    batch = tiny.random_batch(0, "right")
    with torch.no_grad():
        before = model(**inputs(batch)).logits
        CHANGES[what](model, prompts)
        found = model(**inputs(batch)).logits
        attachment_of(model).prefixes._kept.clear()
        # One prompt computed anew rounds otherwise than all of them together.
        assert torch.allclose(found, model(**inputs(batch)).logits, rtol=1e-5, atol=1e-4)
        if what not in ("the dtype", "the embedding"):
            assert not torch.allclose(found, before, atol=1e-3)
    assert found.dtype == model.dtype


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_what_is_kept_is_dropped_with_the_active_adapter() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny.tiny_model(), config).eval()
    model = wrapped.get_base_model()
    attach(model, SoftPrompts.for_model(model, {"long": Tokens(tiny.HARD["long"])}))
    text, ids = torch.tensor([[9, 8, 7]]), tiny.HARD["long"]
    for is_on in (True, False, True):
        (wrapped.base_model.enable_adapter_layers if is_on else wrapped.base_model.disable_adapter_layers)()
        with torch.no_grad():
            expected = type(model).forward(model, torch.tensor([[*ids, 9, 8, 7]])).logits[:, -3:]
            assert torch.allclose(model(text).logits, expected, atol=1e-4)


def test_what_was_not_used_for_longest_makes_room() -> None:
    model, prompts = attached(tiny.tiny_model())
    prefixes, text = attachment_of(model).prefixes, torch.tensor([[9, 8, 7]])
    expected = {}
    with torch.no_grad():
        for task in prompts:
            expected[task] = model(text, tasks=[task]).logits
        assert list(prefixes._kept) == list(prompts.tasks)
        prefixes.most_bytes = sum(prefixes._kept[task].bytes for task in ("long", "one"))
        for task, kept in (("long", ["one", "long"]), ("short", ["long", "short"]), ("one", ["short", "one"])):
            assert torch.equal(model(text, tasks=[task]).logits, expected[task])
            assert list(prefixes._kept) == kept or sum(k.bytes for k in prefixes._kept.values()) <= prefixes.most_bytes
        prefixes.most_bytes = 0  # a batch's own tasks stay for as long as it runs
        batch = tiny.random_batch(0, "right")
        require_rows(tiny.tiny_model(), batch, model(**inputs(batch)).logits)


def test_kept_in_inference_mode_and_trained_after_it() -> None:
    model, prompts = attached(tiny.tiny_model(), "auto")
    batch = tiny.random_batch(0, "right")
    with torch.inference_mode():
        before = model(**inputs(batch)).logits.clone()
    model(**inputs(batch, labels=True)).loss.backward()
    prompts.freeze("long")
    head = nn.Linear(tiny.VOCABULARY, 1)  # a user's own layer, behind a frozen prompt alone
    out = model(batch.input_ids[:2], task_ids=torch.tensor([0, 0])).logits
    head(out).sum().backward()
    with torch.no_grad():
        assert torch.equal(model(**inputs(batch)).logits, before)


def test_a_batch_of_frozen_prompts_is_no_reason_for_backward_to_fail() -> None:
    model, prompts = attached(tiny.tiny_model(), "auto")
    prompts.freeze("long")
    text = torch.tensor([[9, 8, 7], [6, 5, 4]])
    model(text, labels=text, task_ids=torch.tensor([0, 0])).loss.backward()
    assert all(prompts[task].grad is None for task in prompts)


def test_half_precision_keeps_half_precision() -> None:
    model, prompts = attached(tiny.tiny_model().bfloat16())
    batch = tiny.random_batch(0, "left")
    with torch.no_grad():
        model(**inputs(batch))
    kept = attachment_of(model).prefixes._kept["long"]
    assert all(state.dtype == torch.bfloat16 for state in kept.states) and prompts["long"].dtype == torch.float32


def test_the_callers_choice_of_a_cache_is_kept() -> None:
    model, _ = attached(tiny.tiny_model())
    batch = tiny.random_batch(0, "right")
    assert model(**inputs(batch), use_cache=False).past_key_values is None
    assert model(**inputs(batch), use_cache=False, return_dict=False)[0].shape[:2] == batch.input_ids.shape
    assert model(**inputs(batch)).past_key_values.get_seq_length() == batch.input_ids.shape[1]
    model.config.use_cache = False
    out = model(**inputs(batch))
    assert out.past_key_values is None
    require_rows(tiny.tiny_model(), batch, out.logits)


def test_a_model_that_takes_no_prefix(caplog: pytest.LogCaptureFixture) -> None:
    bare = MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2)).eval()
    with pytest.raises(SoftPromptError, match=r"prefix='always' cannot be had: MambaForCausalLM"):
        attached(bare)
    model, _ = attached(bare, "auto")
    batch = tiny.random_batch(0, "right")
    with caplog.at_level(logging.WARNING, "lightning_softprompt"):
        for _ in range(2):
            require_rows(bare, batch, model(**inputs(batch)).logits)
    assert [record.message for record in caplog.records if "MambaForCausalLM" in record.message] == [
        "prompts stand in the sequence, where every row pays for them: MambaForCausalLM takes no position_ids and cache"
    ]


def test_a_batch_that_takes_no_prefix(caplog: pytest.LogCaptureFixture) -> None:
    batch = tiny.random_batch(0, "right")
    model, _ = attached(tiny.tiny_model())
    model.activation_checkpointing_enable()
    with pytest.raises(SoftPromptError, match="cannot be had here: gradient checkpointing"):
        model(**inputs(batch, labels=True))
    model, _ = attached(tiny.tiny_model(), "auto")
    model.activation_checkpointing_enable()
    with caplog.at_level(logging.WARNING, "lightning_softprompt"):
        for _ in range(2):
            model(**inputs(batch, labels=True)).loss.backward()
    assert len(caplog.records) == 1 and "gradient checkpointing" in caplog.text


def test_a_window_that_cuts() -> None:
    bare = mistral(window=4)
    model, _ = attached(bare, "auto")
    seen = widths(model)
    right, left = tiny.random_batch(0, "right"), tiny.random_batch(0, "left")
    length, longest = right.input_ids.shape[1], max(map(len, tiny.HARD.values()))
    with torch.no_grad():
        require_rows(bare, right, model(**inputs(right)).logits)
        assert seen[-1][1] == length, "no pads between prompt and text"
        require_rows(bare, left, model(**inputs(left)).logits)
        assert seen[-1][1] == length + longest, "in the sequence"
    ids = model.generate(**inputs(left), max_new_tokens=5, do_sample=False)
    for index, row in enumerate(left.rows):
        assert ids[index, length:].tolist() == tiny.hard_greedy(bare, row, 5, do_sample=False)[0]


def test_a_window_that_will_cut() -> None:
    bare = mistral(window=18)
    batch = tiny.random_batch(0, "left")
    length = batch.input_ids.shape[1]
    for new in (2, 8):  # within, and beyond
        model, _ = attached(bare, "auto")
        seen = widths(model)
        ids = model.generate(**inputs(batch), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        assert (seen[0][0] == 3) == (new == 2), "the first pass is over three prompts, or over the rows"
        for index, row in enumerate(batch.rows):
            assert ids[index, length:].tolist() == tiny.hard_greedy(bare, row, new, do_sample=False)[0]
        seen.clear()
        with torch.no_grad():  # what a generation had to come is over with it
            model(**inputs(batch))
        assert seen[-1] == (len(batch.rows), length)
    model, _ = attached(bare, "always")
    mask, cache, step = batch.attention_mask, None, batch.input_ids
    with torch.no_grad(), pytest.raises(SoftPromptError, match=r"looks back at 18 columns.*prefix='never'"):
        for _ in range(8):  # a loop of the user's own, which does not say where it ends
            tasks = batch.task_ids if cache is None else None
            out = model(step, attention_mask=mask, past_key_values=cache, task_ids=tasks)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(step)], 1)

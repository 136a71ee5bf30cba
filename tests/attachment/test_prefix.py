"""Prompts as a prefix: the same as in the sequence, computed once a task, and kept for as long as it is true."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import DynamicCache

from lightning_softprompt import SoftPrompts, Tokens, attach
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.attachment.prefix import Prefix, _Kept, _together
from lightning_softprompt.attachment.routing import TaskRows
from tests import tiny
from tests.attachment.helpers import assert_rows_equal, attached_copy, inputs, widths


@pytest.mark.parametrize("logits", ["all", "labels"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_same_loss_and_gradients_as_in_the_sequence(kind: str, side: str, logits: str) -> None:
    bare = tiny.tiny_model(kind)
    (shared, mine), (inline, theirs) = attached_copy(bare, "always", logits), attached_copy(bare, "never", logits)
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


def test_every_task_is_computed_once_a_step_in_training_and_once_for_all_in_inference() -> None:
    model, prompts = attached_copy(tiny.tiny_model(), "auto")
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


def patch(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda *given: own(*given) * 2


CHANGES: dict[str, Any] = {
    "the prompt's data": lambda model, prompts: prompts["long"].data.mul_(1.5),
    "the prompt in place": lambda model, prompts: prompts["long"].detach().add_(0.5),
    "a weight in place": lambda model, prompts: model.model.layers[1].mlp.up_proj.weight.detach().mul_(1.5),
    "a loaded state": lambda model, prompts: model.load_state_dict(tiny.tiny_model(seed=3).state_dict()),
    "another weight": lambda model, prompts: setattr(
        model.model.layers[1].mlp, "up_proj", copy.deepcopy(model.model.layers[0].mlp.up_proj)
    ),
    "a hook": lambda model, prompts: model.model.layers[0].register_forward_hook(lambda *given: given[-1] + 1.0),
    "a hook before": lambda model, prompts: model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, given: (given[0] * 2, *given[1:])
    ),
    "a buffer": lambda model, prompts: model.model.rotary_emb.inv_freq.mul_(0.25),
    "pruning": lambda model, prompts: prune.random_unstructured(model.model.layers[0].self_attn.v_proj, "weight", 0.5),
    "a patched forward": lambda model, prompts: patch(model.model.layers[0].mlp),
    "the configuration": lambda model, prompts: setattr(model.config, "num_hidden_layers", 1),
    "the dtype": lambda model, prompts: model.double(),
    "the embedding": lambda model, prompts: model.resize_token_embeddings(tiny.VOCABULARY + 1, mean_resizing=False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_kept_is_dropped_with_what_it_was_computed_from(what: str) -> None:
    model, prompts = attached_copy(tiny.tiny_model())
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
    model, prompts = attached_copy(tiny.tiny_model())
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
        assert_rows_equal(tiny.tiny_model(), batch, model(**inputs(batch)).logits)


def test_kept_in_inference_mode_and_trained_after_it() -> None:
    model, prompts = attached_copy(tiny.tiny_model(), "auto")
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


def test_half_precision_keeps_half_precision() -> None:
    model, prompts = attached_copy(tiny.tiny_model().bfloat16())
    batch = tiny.random_batch(0, "left")
    with torch.no_grad():
        model(**inputs(batch))
    kept = attachment_of(model).prefixes._kept["long"]
    assert all(state.dtype == torch.bfloat16 for state in kept.states) and prompts["long"].dtype == torch.float32


def test_the_callers_choice_of_a_cache_is_kept() -> None:
    model, _ = attached_copy(tiny.tiny_model())
    batch = tiny.random_batch(0, "right")
    assert model(**inputs(batch), use_cache=False).past_key_values is None
    assert model(**inputs(batch), use_cache=False, return_dict=False)[0].shape[:2] == batch.input_ids.shape
    assert model(**inputs(batch)).past_key_values.get_seq_length() == batch.input_ids.shape[1]
    model.config.use_cache = False
    out = model(**inputs(batch))
    assert out.past_key_values is None
    assert_rows_equal(tiny.tiny_model(), batch, out.logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_what_is_kept_is_dropped_with_the_scale_of_an_adapter_and_with_autocast() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.tiny_model(), config).eval().get_base_model()
    attach(model, SoftPrompts.for_model(model, {"long": Tokens(tiny.HARD["long"])}))
    text, ids = torch.tensor([[9, 8, 7]]), tiny.HARD["long"]
    for scale, is_autocast in ((1.0, False), (4.0, False), (4.0, True), (4.0, False)):
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", scale)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            found = model(text).logits
            attachment_of(model).prefixes.clear()
            assert torch.equal(found, model(text).logits)  # the same passes again
            if not is_autocast:
                expected = type(model).forward(model, torch.tensor([[*ids, 9, 8, 7]])).logits[:, -3:]
                assert tiny.relative_error(found, expected) < 1e-5


def test_what_hides_from_the_key_is_cleared_by_hand() -> None:
    model, _ = attached_copy(tiny.tiny_model())
    text, shift = torch.tensor([[9, 8, 7]]), [0.0]
    model.model.layers[0].register_forward_hook(lambda *given: given[-1] + shift[0])
    with torch.no_grad():
        before = model(text, tasks=["long"]).logits
        shift[0] = 1.0  # nothing of the base tells
        attachment_of(model).prefixes.clear()
        found = model(text, tasks=["long"]).logits
        expected = type(model).forward(model, torch.tensor([[*tiny.HARD["long"], 9, 8, 7]])).logits[:, -3:]
    assert tiny.relative_error(found, expected) < 1e-5 < tiny.relative_error(before, expected)


def test_what_was_unused_for_longest_goes_first_and_what_is_in_use_stays() -> None:
    bare = tiny.tiny_model()
    model = copy.deepcopy(bare)
    prompts = SoftPrompts.for_model(model, {task: Tokens([index, index + 1]) for index, task in enumerate("abc", 5)})
    prefixes = attachment_of(attach(model, prompts, prefix="always")).prefixes
    text = torch.tensor([[9, 8, 7]])
    with torch.no_grad():
        for task in "aba":
            model(text, tasks=[task])
        prefixes.most_bytes = sum(kept.bytes for kept in prefixes._kept.values())  # room for two
        model(text, tasks=["c"])
        assert list(prefixes._kept) == ["a", "c"]
        prefixes.most_bytes = 0
        logits = model(text.expand(3, -1), tasks=list("abc")).logits
        assert sorted(prefixes._kept) == ["a", "b", "c"]
        model(text, tasks=["b"])
        assert list(prefixes._kept) == ["b"]
        for row, hard in zip(logits, ([5, 6], [6, 7], [7, 8]), strict=True):
            assert tiny.relative_error(row, tiny.hard_row(bare, tiny.Row(0, hard, [9, 8, 7]))) < 1e-5


def test_tasks_that_come_together_again_are_stacked_once() -> None:
    model, prompts = attached_copy(tiny.tiny_model())
    prefixes = attachment_of(model).prefixes
    with torch.no_grad():
        first = prefixes.of_tasks(["long", "short"])
        assert prefixes.of_tasks(["long", "short"]) is first and prefixes.of_tasks(["short", "long"]) is not first
        for tasks in (["one"], ["long"], ["long", "short"]):  # the last is used again
            prefixes.of_tasks(tasks)
        prefixes.of_tasks(["short", "one"])  # and the short before the long was unused for longest
        assert list(prefixes._stacks) == [("one",), ("long",), ("long", "short"), ("short", "one")]
        prompts["short"].mul_(-1)
        others = prefixes.of_tasks(["one"])
        again = prefixes.of_tasks(["long", "short"])
        assert again is not first and list(prefixes._stacks) == [("long",), ("one",), ("long", "short")]
        assert torch.equal(again.logits[0], first.logits[0]) and not torch.allclose(again.logits[1], first.logits[1])
        prefixes.most_bytes = sum(kept.bytes for kept in prefixes._kept.values()) + others.bytes
        assert prefixes.of_tasks(["one"]) is others
        assert list(prefixes._stacks) == [("one",)] and len(prefixes._kept) == 3
        model.lm_head.weight.mul_(2)
        assert prefixes.of_tasks(["one"]) is not others
        prefixes.clear()
        assert not prefixes._stacks


def test_a_task_that_comes_back_at_another_length_is_computed_anew() -> None:
    bare = tiny.tiny_model()
    model = copy.deepcopy(bare)
    prompts = SoftPrompts.for_model(model, {"a": Tokens([5, 6]), "b": Tokens([7])})
    attach(model, prompts, prefix="always")
    with torch.no_grad():
        model(torch.tensor([[9, 8]]), tasks=["a"])
        prompts.remove("a")
        prompts.add("a", Tokens([20, 21, 22]), model=bare)
        found = model(torch.tensor([[9, 8]]), tasks=["a"]).logits[0]
    assert tiny.relative_error(found, tiny.hard_row(bare, tiny.Row(0, [20, 21, 22], [9, 8]))) < 1e-5


def test_the_keys_and_values_of_each_layer_stay_where_their_layer_is() -> None:
    there, here = torch.device("meta"), torch.device("cpu")
    devices = [here, here, there, there]  # keys and values of two layers
    computed = Prefix([torch.ones(2, 3, 4, 5, device=each) for each in devices], torch.ones(2, 9), (4, 2))
    kept = [_Kept.of(torch.ones(length, 8), computed, place) for place, length in enumerate(computed.lengths)]
    found = _together(kept)
    assert [state.device for state in found.states] == devices and found.states[2].shape == (2, 3, 4, 5)
    rows = TaskRows(("b", None, "a"), ("a", "b"), (1, -1, 0), (2, 0, 4), (4, 2))
    cache = DynamicCache()
    found.fill(cache, rows)
    assert [layer.keys.device for layer in cache.layers] == [here, there]
    assert cache.layers[1].values.shape == (3, 3, 4, 5)
    layout = found.layout(rows, here)
    assert layout.attention_mask.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]

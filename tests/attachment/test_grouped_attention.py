"""Grouped heads under a mask: keys and values are not copied, and loss and gradients are what they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_softprompt import attach, detach
from lightning_softprompt.attachment import grouped_attention
from tests import tiny
from tests.attachment.helpers import hard_prompts, inputs, recompute_layers

QUERY_HEADS, KEY_HEADS = 4, 2


class Heads(TorchFunctionMode):
    """Notes how many heads of queries and of keys attention is called with, under a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            self.seen.append((args[0].shape[1], args[1].shape[1]))
        return func(*args, **(kwargs or {}))


@contextmanager
def heads() -> Iterator[list[tuple[int, int]]]:
    with Heads() as mode:
        yield mode.seen


def step(model: Any, batch: tiny.Batch, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.soft_prompts.zero_grad()
    loss = model(**inputs(batch), labels=batch.labels, **options).loss
    loss.backward()
    return loss.detach(), {task: model.soft_prompts[task].grad.clone() for task in model.soft_prompts}


@pytest.mark.parametrize("prefix", ["always", "never"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_are_those_of_copied_keys(prefix: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model().double()
    attach(model, hard_prompts(model), prefix=prefix)
    batch = tiny.random_batch(3, side)
    with heads() as seen:
        loss, gradients = step(model, batch)
    assert seen and set(seen) == {(QUERY_HEADS, KEY_HEADS)}, "keys were copied for each query head"
    monkeypatch.setattr(grouped_attention, "_takes_groups", lambda *_: False)
    with heads() as seen:
        loss_of_copies, gradients_of_copies = step(model, batch)
    assert set(seen) == {(QUERY_HEADS, QUERY_HEADS)}
    assert tiny.relative_error(loss, loss_of_copies) < 1e-12
    for task, gradient in gradients.items():
        assert gradient.abs().max() > 0 and tiny.relative_error(gradient, gradients_of_copies[task]) < 1e-12


def test_other_models_and_detached_ones_go_on_as_before() -> None:
    model, other = tiny.tiny_model(), tiny.tiny_model(seed=1)
    attach(model, hard_prompts(model))
    batch = tiny.random_batch(0, "left")
    bare = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with heads() as seen:
        other(**bare)
    assert set(seen) == {(QUERY_HEADS, QUERY_HEADS)}
    with heads() as seen:
        copy.deepcopy(model)(**inputs(batch))
    assert set(seen) == {(QUERY_HEADS, KEY_HEADS)}
    detach(model)
    with heads() as seen:
        model(**bare)
    assert set(seen) == {(QUERY_HEADS, QUERY_HEADS)}


def test_layers_that_are_computed_again_outside_of_a_pass_are_what_they_were() -> None:
    """As FSDP's wrapper does: a checkpoint that finds other tensors in the backward pass raises."""
    model = tiny.tiny_model()
    attach(model, hard_prompts(model), prefix="never")
    batch = tiny.random_batch(1, "left")
    loss, gradients = step(model, batch, use_cache=False)
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, _forward=forward, **kwargs: checkpoint(
            _forward, *args, use_reentrant=False, **kwargs
        )
    again, gradients_again = step(model, batch, use_cache=False)
    assert tiny.relative_error(again, loss) < 1e-6
    for task, gradient in gradients.items():
        assert tiny.relative_error(gradients_again[task], gradient) < 1e-5


def test_what_only_transformers_own_function_knows_is_left_to_it() -> None:
    called = []

    def before(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        called.append(kwargs)
        return args[1], None

    attention = grouped_attention._around(before)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2
    grouped_attention.GroupedAttention(layer)
    query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(each.shape, generator=draw, dtype=torch.float64) for each in (query, key, key)]
    found, _ = attention(layer, *given, mask, scaling=0.2, sliding_window=None)
    copied = (each.repeat_interleave(2, 1) for each in given[1:])
    expected = functional.scaled_dot_product_attention(given[0], *copied, attn_mask=mask, scale=0.2).transpose(1, 2)
    assert not called and tiny.relative_error(found, expected) < 1e-12
    for others in ({"softcap": 30.0}, {"position_bias": torch.zeros(1, 4, 3, 3)}, {"output_attentions": True}):
        attention(layer, query, key, key, mask, scaling=0.5, **others)
        assert called.pop()["scaling"] == 0.5
    attention(layer, query, key, key, None)
    attention(layer, query[:, :, :1], key, key, mask[:, :, :1])
    attention(layer, query, key, torch.ones(1, 2, 3, 6), mask)  # no fused kernel for values of another size
    assert len(called) == 3


def test_a_base_that_is_shared_stays_as_it_is_when_one_of_its_models_is_detached() -> None:
    model = tiny.tiny_model()
    other = type(model)(model.config).eval()
    other.model, other.lm_head = model.model, model.lm_head
    for each in (model, other):
        attach(each, hard_prompts(each))
    recompute_layers(model)
    batch = tiny.random_batch(0, "left")
    loss = model(**inputs(batch), labels=batch.labels).loss
    detach(other)
    loss.backward()  # its layers run again, and find the same tensors
    with heads() as seen:
        model(**inputs(batch))
    assert set(seen) == {(QUERY_HEADS, KEY_HEADS)}
    detach(model)
    with heads() as seen:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert set(seen) == {(QUERY_HEADS, QUERY_HEADS)}

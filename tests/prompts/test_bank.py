"""Prompts as the parameters of a module: found by name, indexed and packed."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens


def test_tasks_go_through_a_model_in_the_order_of_their_names(model) -> None:
    prompts = SoftPrompts.for_model(model, {"z": 2, "a": 3, "m": 1})
    assert prompts.distinct([0, -1, 2, 0, 1]) == [1, 2, 0]
    packed, offsets = prompts.packed([1, 0])
    assert torch.equal(packed, torch.cat([prompts["a"], prompts["z"]])) and offsets.tolist() == [0, 3, 5]
    assert prompts.packed([])[0].shape == (0, prompts.hidden_size)


def test_gradients_are_wanted_where_a_prompt_trains(model) -> None:
    prompts = SoftPrompts.for_model(model, {"a": 2, "b": 3})
    prompts.freeze("a")
    assert prompts.want_gradients([0, 1]) and not prompts.want_gradients([0]) and not prompts.want_gradients([])
    with torch.no_grad():
        assert not prompts.want_gradients([0, 1])


@pytest.mark.parametrize(
    "value, dtype", [(float("nan"), torch.float32), (float("-inf"), torch.float32), (1e6, torch.float16)]
)
def test_prompts_that_are_not_finite_are_named(model, value: float, dtype: torch.dtype) -> None:
    prompts = SoftPrompts.for_model(model, {"a": 2, "b": Tokens([5])})
    prompts.check_finite([0, 1, -1], dtype)
    with torch.no_grad():
        prompts["b"][0, 3] = value
    prompts.check_finite([0], dtype)
    prompts.check_finite([], dtype)
    with pytest.raises(SoftPromptError, match="prompt of task 'b' holds a number that is not finite"):
        prompts.check_finite([0, 1], dtype)

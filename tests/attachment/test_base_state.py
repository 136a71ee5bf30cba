"""The key of a base: the same for the same base, another one after each change, and never that of its prompts."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_softprompt.attachment.base_state import BaseState
from tests import tiny
from tests.attachment.helpers import attached_copy
from tests.attachment.test_prefix import CHANGES


def test_calls_and_prompts_change_nothing() -> None:
    model, prompts = attached_copy(tiny.tiny_model())
    before = BaseState.of(model)
    model(torch.tensor([[9, 8, 7]]), tasks=["long"])
    with torch.no_grad():
        prompts["long"].mul_(2)
        model.generate(torch.tensor([[9, 8, 7]]), tasks=["short"], max_new_tokens=2)
    prompts.remove("one")
    assert BaseState.of(model) == before and before != BaseState.of(tiny.tiny_model())


@pytest.mark.parametrize("what", [what for what in CHANGES if "prompt" not in what])
def test_every_change_of_the_base_changes_the_key(what: str) -> None:
    model, prompts = attached_copy(tiny.tiny_model())
    before = BaseState.of(model)
    with torch.no_grad():
        CHANGES[what](model, prompts)
    assert BaseState.of(model) != before


def test_autocast_is_part_of_the_key_while_it_lasts() -> None:
    model, _ = attached_copy(tiny.tiny_model())
    before = BaseState.of(model)
    keys = []
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(BaseState.of(model))
    assert before != keys[0] != keys[1] != before and BaseState.of(model) == before


def test_a_hook_that_is_taken_off_again_leaves_the_key_as_it_was() -> None:
    model, _ = attached_copy(tiny.tiny_model())
    before = BaseState.of(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert BaseState.of(model) != before
    handle.remove()
    assert BaseState.of(model) == before


def test_what_comes_after_what_is_gone_is_never_taken_for_it() -> None:
    """Python gives a new object the number, and a new tensor the memory, of one that is gone."""
    model, _ = attached_copy(tiny.tiny_model())
    module = model.model.layers[0].mlp
    for seed in range(20):
        before = BaseState.of(model)
        weight = torch.nn.Parameter(torch.full_like(module.up_proj.weight, seed))
        del module.up_proj.weight
        module.up_proj.weight = weight
        after = BaseState.of(model)
        assert after != before
        module.__dict__["forward"] = partial(type(module).forward, module)
        assert BaseState.of(model) != after
        patched = BaseState.of(model)
        del module.__dict__["forward"]
        module.__dict__["forward"] = partial(type(module).forward, module)
        assert BaseState.of(model) != patched
        del module.__dict__["forward"]


@pytest.mark.parametrize("name", ["rope_parameters", "layer_types"])
def test_what_is_nested_in_the_configuration_counts(name: str) -> None:
    model, _ = attached_copy(tiny.tiny_model())
    before = BaseState.of(model)
    setattr(model.config, name, {"rope_type": "linear", "factor": 2.0} if name == "rope_parameters" else ["full"] * 2)
    assert BaseState.of(model) != before

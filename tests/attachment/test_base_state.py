"""The key of a base: the same for the same base, another one after each change, and never that of its prompts."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt.attachment.base_state import base_state
from tests import tiny
from tests.attachment.helpers import attached_copy
from tests.attachment.test_prefix import CHANGES


def test_calls_and_prompts_change_nothing() -> None:
    model, prompts = attached_copy(tiny.tiny_model())
    before = base_state(model)
    model(torch.tensor([[9, 8, 7]]), tasks=["long"])
    with torch.no_grad():
        prompts["long"].mul_(2)
        model.generate(torch.tensor([[9, 8, 7]]), tasks=["short"], max_new_tokens=2)
    prompts.remove("one")
    assert base_state(model) == before != base_state(tiny.tiny_model())


@pytest.mark.parametrize("what", [what for what in CHANGES if "prompt" not in what])
def test_every_change_of_the_base_changes_the_key(what: str) -> None:
    model, prompts = attached_copy(tiny.tiny_model())
    before = base_state(model)
    with torch.no_grad():
        CHANGES[what](model, prompts)
    assert base_state(model) != before


def test_autocast_is_part_of_the_key_while_it_lasts() -> None:
    model, _ = attached_copy(tiny.tiny_model())
    before = base_state(model)
    keys = []
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(base_state(model))
    assert len({before, *keys}) == 3 and base_state(model) == before


def test_a_hook_that_is_taken_off_again_leaves_the_key_as_it_was() -> None:
    model, _ = attached_copy(tiny.tiny_model())
    before = base_state(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert base_state(model) != before
    handle.remove()
    assert base_state(model) == before

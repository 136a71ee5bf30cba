"""A base is frozen while prompts are attached, and is what it was afterwards, also where several models share it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lightning_softprompt import SoftPromptError, attach, detach
from lightning_softprompt.attachment.frozen_base import FrozenBase
from tests import tiny
from tests.attachment.helpers import hard_prompts


def state(model: nn.Module) -> dict[str, bool]:
    """What is trainable, and what is in training mode."""
    parameters = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return parameters | {f"mode of {name}": module.training for name, module in model.named_modules()}


def test_what_was_frozen_before_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].bias.requires_grad_(False)
    model[1].eval()
    before = state(model)
    frozen = FrozenBase(model)
    assert not any(state(model).values())
    frozen.restore()
    assert state(model) == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_that_share_a_base_are_detached_apart(order: tuple[int, int]) -> None:
    first = tiny.tiny_model("llama").train()
    second = LlamaForCausalLM(first.config).train()
    second.model = first.model
    first.model.norm.weight.requires_grad_(False)
    models, before = (first, second), (state(first), state(second))
    for model in models:
        attach(model, hard_prompts(model))
    gone, left = (models[index] for index in order)
    detach(gone)
    assert not any(parameter.requires_grad for parameter in left.model.parameters())
    assert not any(module.training for module in left.model.modules())
    assert gone.lm_head.weight.requires_grad and gone.lm_head.training  # its own
    loss = left(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]), tasks=["one"]).loss
    loss.backward()
    assert left.soft_prompts["one"].grad is not None and first.model.layers[0].mlp.up_proj.weight.grad is None
    detach(left)
    assert (state(first), state(second)) == before
    assert not any("forward" in layer.__dict__ for layer in first.model.layers)


def test_a_shallow_copy_is_neither_attached_nor_silently_bare() -> None:
    """It shares hooks and modules with the model that it was copied from."""
    model = tiny.tiny_model("llama")
    attach(model, hard_prompts(model))
    shallow = copy.copy(model)
    text = torch.tensor([[5, 6]])
    for refused in (lambda: shallow(text, tasks=["one"]), lambda: attach(shallow, hard_prompts(model))):
        with pytest.raises(SoftPromptError, match=r"shallow copy .* copy\.deepcopy"):
            refused()
    with pytest.raises(SoftPromptError, match="nothing to detach"):
        detach(shallow)
    hard = tiny.hard_row(tiny.tiny_model("llama"), tiny.Row(2, tiny.HARD["one"], [5, 6]))
    assert tiny.relative_error(model(text, tasks=["one"]).logits[0].detach(), hard) < 1e-5

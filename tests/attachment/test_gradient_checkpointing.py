"""Gradient checkpointing of an attached model: layers run once more in the backward pass, with dropout off."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from lightning_softprompt import attach
from tests import tiny
from tests.attachment.helpers import hard_prompts, inputs, recompute_layers, require_exact


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_layers_and_leaves_dropout_off(reentrant: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=tiny.VOCABULARY, **sizes, num_attention_heads=4, dropout=0.5, init_std=0.3)
    model = OPTForCausalLM(config)
    model.generation_config.eos_token_id = None
    bare = copy.deepcopy(model).eval()
    runs = []
    for layer in model.model.decoder.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    prompts = require_exact(model, bare)
    without = {task: prompts[task].grad.clone() for task in prompts}
    prompts.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # after attach, and in eval mode
    for seed, side in ((0, "left"), (1, "right"), (2, "left")):
        batch = tiny.random_batch(seed, side)
        runs.clear()
        out = model(**inputs(batch), labels=batch.labels)
        assert len(runs) == 2 and not any(module.training for module in model.model.modules())
        out.loss.backward()
        assert len(runs) == 4, "each layer runs once more, in the backward pass"
        assert not any(module.training for module in model.model.modules())
        assert out.past_key_values is None
    for task in prompts:
        assert tiny.relative_error(prompts[task].grad, without[task]) < 1e-5
    with torch.no_grad():  # nothing to recompute, and a cache to keep
        model(**inputs(batch))  # transformers has put a hook on the embedding: prompts are computed anew, once
        runs.clear()
        assert model(**inputs(batch)).past_key_values is not None
    assert len(runs) == 2


def test_checkpointing_survives_an_interrupted_pass() -> None:
    model = tiny.tiny_model()
    bare = copy.deepcopy(model)
    recompute_layers(model)
    prompts = hard_prompts(model)
    attach(model, prompts)
    batch = tiny.random_batch(0, "left")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs(batch))
    handle.remove()
    out = model(**inputs(batch), labels=batch.labels)
    out.loss.backward()
    assert not any(module.training for module in model.model.modules())
    row = batch.rows[0]
    found = out.logits.detach()[0, batch.start[0] : batch.start[0] + len(row.text)]
    assert tiny.relative_error(found, tiny.hard_row(bare, row)) < 1e-5

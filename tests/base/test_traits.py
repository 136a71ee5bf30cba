"""What laying out rows for a model has to know about it, of models whose answers are known."""

from __future__ import annotations

import pytest
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from lightning_softprompt.base.traits import ModelTraits
from tests import tiny

SMALL = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_usual_models(kind: str) -> None:
    model = tiny.tiny_model(kind)
    found = ModelTraits.of(model)
    assert found.model is model and found.arguments[0] == "input_ids" and "labels" in found.arguments
    assert (found.padding_side, found.position_offset, found.placeholder) == ("left", 0, 2)
    assert found.shifts_its_loss and found.has_usual_loss({}) and found.longest_rotation is None


def test_models_that_count_positions_from_elsewhere_or_not_at_all() -> None:
    roberta = RobertaForCausalLM(RobertaConfig(**SMALL, is_decoder=True, pad_token_id=3))
    assert ModelTraits.of(roberta).position_offset == 4  # one behind the pad
    bloom = ModelTraits.of(BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)))
    assert bloom.padding_side == "left" and "position_ids" not in bloom.arguments and bloom.position_offset == 0
    assert not bloom.takes_positions and ModelTraits.of(roberta).takes_positions


def test_what_stands_against_a_prefix_and_against_gaps() -> None:
    usual = ModelTraits.of(tiny.tiny_model())
    assert usual.obstacle is None and usual.longest_with_gaps is None
    windows = ModelTraits.of(MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, sliding_window=5)))
    assert windows.obstacle is None and windows.longest_with_gaps == 5
    mpt = ModelTraits.of(MptForCausalLM(MptConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=2)))
    assert mpt.longest_with_gaps == 0  # it counts pads as distance
    mamba = ModelTraits.of(MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)))
    assert mamba.obstacle == "it takes no position_ids and cache" and mamba.longest_with_gaps == 0


@pytest.mark.parametrize(
    "rope, expected",
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, None),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}, 16),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
    ],
    ids=str,
)
def test_rotations_that_depend_on_the_longest_row(rope: dict, expected: int | None) -> None:
    config = LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters={"rope_theta": 10_000.0, **rope})
    assert ModelTraits.of(LlamaForCausalLM(config)).longest_rotation == expected


def test_a_loss_with_something_beside_it_is_not_the_usual_one() -> None:
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    found = ModelTraits.of(MixtralForCausalLM(config))
    assert found.has_usual_loss({}) and not found.has_usual_loss({"output_router_logits": True})
    config.output_router_logits = True
    found = ModelTraits.of(MixtralForCausalLM(config))
    assert found.shifts_its_loss and not found.has_usual_loss({})
    assert found.has_usual_loss({"output_router_logits": False})


def test_how_many_positions_a_model_has() -> None:
    assert ModelTraits.of(tiny.tiny_model("gpt2")).positions == 128
    assert ModelTraits.of(tiny.tiny_model("llama")).positions is None  # they are computed, and have no end
    roberta = RobertaForCausalLM(RobertaConfig(**SMALL, is_decoder=True, pad_token_id=3, max_position_embeddings=32))
    assert ModelTraits.of(roberta).positions == 32  # of which the first 4 count nothing

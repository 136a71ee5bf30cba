"""Ragged rows as padded ones, against what a tokenizer makes of them, and the side that a model needs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from lightning_softprompt.base.padding import pad_left, pad_token_id, padded_inputs, padding_side
from tests import tiny
from tests.tokenizer import word_tokenizer

ROWS = [[5, 6, 7], [8], [9, 9]]


def test_shorter_rows_stand_behind_their_pads() -> None:
    assert pad_left(ROWS, 1).tolist() == [[5, 6, 7], [1, 1, 8], [1, 9, 9]]
    found = padded_inputs(ROWS, 1)
    expected = word_tokenizer(["a"]).pad({"input_ids": ROWS}, padding_side="left", return_tensors="pt")
    assert set(found) == {"input_ids", "attention_mask"}
    for name, value in found.items():
        assert value.tolist() == expected[name].tolist() and value.dtype == expected[name].dtype


@pytest.mark.parametrize("pad, end, expected", [(0, 2, 0), (None, 2, 2), (None, 0, 0), (None, None, 5), (3, None, 3)])
def test_pads_are_the_pad_token_or_else_the_end_of_a_text_or_else_another_special_one(pad, end, expected: int) -> None:
    assert pad_token_id(SimpleNamespace(pad_token_id=pad, eos_token_id=end, all_special_ids=[5, 6])) == expected


@pytest.mark.parametrize(
    "pad, end, others, expected",
    [(8, 2, [], 8), (9, 2, [], 2), (9, 9, [11, 5], 5), (9, 10, [11], 0), (None, None, [], 0), (-1, 2, [], 2)],
)
def test_pads_are_what_the_embedding_knows(pad, end, others: list[int], expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=end, all_special_ids=others)
    assert pad_token_id(tokenizer, vocabulary=9) == expected


def test_pads_go_left_where_a_model_takes_positions_and_does_not_count_columns() -> None:
    assert [padding_side(tiny.tiny_model(kind)) for kind in ("llama", "gpt2")] == ["left", "left"]
    bloom = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    assert padding_side(bloom) == "left"  # it takes no positions, and its bias counts by the mask
    mamba = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    assert padding_side(mamba) == "right"  # it takes none, and reads pads
    config = RecurrentGemmaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, lru_width=8, intermediate_size=12
    )
    assert padding_side(RecurrentGemmaForCausalLM(config)) == "right"  # it takes them, and reads pads

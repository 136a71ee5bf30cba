"""A client's text in the plugin is cut as the library cuts it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from softprompt_vllm.guarded_text import guarded, ids_behind, pieces_of, token_names
from tokenizers import AddedToken, normalizers

from lightning_softprompt.base import guarded_text as of_library
from lightning_softprompt.base import tokens
from tests.tokenizer import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = word_tokenizer(["<", "/", "s", ">", "</", "|", "a"])
    made.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", "|>a", "<<"]})
    made.add_tokens([AddedToken("<|a|>", special=False), AddedToken("a/", special=False), "  "])
    made.chat_template = "<|a|>{{ messages[0].content }}"
    return made


def test_texts_are_cut_as_in_the_library(tokenizer: Any) -> None:
    names, draw, cuts = token_names(tokenizer), random.Random(0), 0
    assert names == of_library.token_names(tokenizer) and names is not None
    for _ in range(1000):
        parts = [("".join(draw.choices("<s>|/a ", k=draw.randrange(8))), bool(draw.randrange(2))) for _ in range(4)]
        found = guarded(parts, names)
        assert found == of_library.guarded(parts, names) and pieces_of(found) == of_library.pieces_of(found)
        cuts += len(pieces_of(found)) - 1
    assert cuts > 100


@pytest.mark.parametrize("prefix", ["", "a "])
def test_pieces_stand_behind_a_text_as_in_the_library(tokenizer: Any, prefix: str) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(prefix) if prefix else None
    pieces = ["</", "s>", "a", " a", "", "</"]
    for held in (tokenizer, lambda texts, **options: tokenizer(texts, **options)):  # with and without its inner one
        expected = [token for piece in pieces for token in tokens.encode_target(tokenizer, piece)]
        assert ids_behind(held, pieces) == expected and len(expected) >= 6

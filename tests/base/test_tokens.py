"""Between texts and token ids, with tokenizers that put something around a text."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lightning_softprompt import SoftPromptError
from lightning_softprompt.base.tokens import (
    check_ids,
    decode_new,
    encode_chat,
    encode_target,
    encode_text,
    encode_turns,
)
from tests.tokenizer import word_tokenizer

BOS, PAD, EOS = range(3)
A, B, SO = range(4, 7)


@pytest.fixture
def tokenizer():
    """Begins a text with <bos> and ends it with <eos>."""
    made = word_tokenizer(["a", "b", "so"])
    special = [("<bos>", BOS), ("<eos>", EOS)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    assert made("a b")["input_ids"] == [BOS, A, B, EOS]
    return made


def test_a_text_keeps_what_stands_in_front_and_a_target_nothing_around_it(tokenizer) -> None:
    assert encode_text(tokenizer, "a b") == [BOS, A, B]
    assert encode_target(tokenizer, "a b") == [A, B]
    assert encode_text(word_tokenizer(["a", "b"]), "a b") == [A, B]


def test_a_text_of_its_end_alone_is_kept() -> None:
    assert encode_text(word_tokenizer(["a"]), "<eos>") == [EOS]


def test_a_chat_ends_where_the_assistant_answers(tokenizer) -> None:
    with pytest.raises(SoftPromptError, match="the tokenizer has no chat template"):
        encode_chat(tokenizer, "a")
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ 'so ' if turn.role == 'system' else '' }}{{ turn.content }} {% endfor %}"
        "{% if add_generation_prompt %}<unk>{% endif %}"
    )
    assert encode_chat(tokenizer, "a b") == [A, B, 3]
    assert encode_chat(tokenizer, "a b", system="b") == [SO, B, A, B, 3]


def test_new_tokens_are_decoded_without_the_text_and_special_tokens(tokenizer) -> None:
    sequences = torch.tensor([[PAD, A, B, SO, EOS], [A, A, EOS, PAD, PAD]])
    assert decode_new(tokenizer, sequences, 2, PAD) == ["bso", ""]


def test_what_is_fed_behind_an_answer_is_no_part_of_it(tokenizer) -> None:
    sequences = torch.tensor([[A, A, B, SO, A, A], [A, A, B, A, B, B]])  # pads with a word
    assert decode_new(tokenizer, sequences, 1, A) == ["abso", "ababb"]


def test_ids_have_to_be_those_of_the_embedding() -> None:
    check_ids([0, 60, 3], 61, "the text")
    check_ids([], 61, "the text")
    for ids, found in (([3, 61, 5], 61), ([3, -2, 5], -2)):
        with pytest.raises(
            SoftPromptError, match=f"^the text has token {found}, the model's embedding knows 0 to 60; t"
        ):
            check_ids(ids, 61, "the text")


def test_a_chat_of_many_turns_ends_where_the_assistant_answers(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.content }} {% endfor %}{% if add_generation_prompt %}so{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]
    assert [each for each in encode_turns(tokenizer, turns) if each > EOS] == [A, B, A, SO]
    assert encode_turns(tokenizer, turns[:1]) == encode_chat(tokenizer, "a")
    tokenizer.chat_template = None
    with pytest.raises(SoftPromptError, match="the tokenizer has no chat template"):
        encode_turns(tokenizer, turns)

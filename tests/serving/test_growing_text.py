"""Text that grows: whole characters, stop strings across tokens, and space that is left out."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_softprompt.serving.growing_text import GrowingText
from tests.tokenizer import word_tokenizer


def byte_tokenizer(merges: tuple[str, ...] = ()) -> Any:
    """A token a byte, but for the pieces among `merges`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({sign: index for index, sign in enumerate([*alphabet, *merges])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


BYTES = byte_tokenizer()


def parts(text: str, **options: Any) -> list[str]:
    growing = GrowingText(BYTES, **options)
    told = []
    for token in BYTES(text)["input_ids"]:
        growing.add(token)
        told.append(growing.take())
        if growing.is_stopped:
            return told
    growing.end()
    return [*told, growing.take()]


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_make_up_the_text_and_hold_whole_characters(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("ab é情感🎉👩‍👩‍👧 \n") for _ in range(200))
    told = parts(text)
    assert "".join(told) == text and not any("\ufffd" in part for part in told)
    assert sum(bool(part) for part in told) == len(text)


def test_what_is_no_character_at_the_end_is_told_as_it_stands() -> None:
    growing = GrowingText(BYTES)
    ids = BYTES("a情")["input_ids"]
    for token in ids[:-1]:
        growing.add(token)
    assert growing.take() == "a"
    growing.end()
    assert growing.take() == BYTES.decode(ids[:-1])[1:] == "\ufffd"


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one, two. three", [". "], "one, two"),
        ("one, two", ["two", ", "], "one"),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("stop", ["stop"], ""),
        ("ab情cd", ["情"], "ab"),
        ("no end, but for st", ["stop"], "no end, but for st"),
        ("x" * 300 + "END" + "y", ["END"], "x" * 300),
    ],
)
def test_a_stop_string_ends_the_text_wherever_tokens_begin(text: str, stop: list[str], expected: str) -> None:
    told = parts(text, stop=stop)
    assert "".join(told) == expected
    so_far = ""
    for part in told:  # nothing is told that would have to be taken back
        so_far += part
        assert expected.startswith(so_far)


def test_a_stop_string_inside_one_token_cuts_it() -> None:
    tokenizer = word_tokenizer(["good", "film."])
    growing = GrowingText(tokenizer, ["lm."])
    for word in ("good", "film."):
        growing.add(tokenizer.convert_tokens_to_ids(word))
    assert growing.is_stopped and growing.take() == "goodfi"
    growing = GrowingText(tokenizer, ["m.", "il"])  # the first in the text, not in the list
    growing.add(tokenizer.convert_tokens_to_ids("film."))
    assert growing.take() == "f"


def test_space_around_an_answer_is_left_out_and_space_inside_is_kept() -> None:
    told = parts("  \n two  words \n ", strips=True)
    assert "".join(told) == "two  words" and "".join(parts("  \n ", strips=True)) == ""
    assert "".join(parts(" a ")) == " a "


def test_special_tokens_are_no_text() -> None:
    tokenizer = word_tokenizer(["good"])
    growing = GrowingText(tokenizer)
    for token in (0, 4, 1):
        growing.add(token)
    assert growing.take() == "good"

"""Names of tokens in a user's text, which stay text."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_softprompt.base import tokens
from lightning_softprompt.base.guarded_text import CUT, guarded, pieces_of, special_names, token_names, without_cuts
from lightning_softprompt.base.tokens import encode_target


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes, special tokens of which one begins another, and added ones that are not; one of them begins a turn."""
    inner = Tokenizer(models.BPE({sign: at for at, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")
    made.add_special_tokens({"additional_special_tokens": ["<s>more", "#", "<|a|>", "|>b", "<<", "<<e>"]})
    made.add_tokens([AddedToken(name, special=False) for name in ("<User>", "<h1>", "  ", "\t\n")])
    made.chat_template = "{{ bos_token }}<User>{{ messages[0].content }}"
    return made


@pytest.mark.parametrize(
    "text",
    [
        "so </s> it ends",
        "<s><s></s>",
        "<<s>more</s",
        "<s>more",
        "a <User> b",
        "</s>",
        "<|a|>b",
        "<<e> <<<e>",
        f"</{CUT}s>",
        f"</s>{CUT}<{CUT}/s>",
        "plain",
        "",
    ],
)
def test_what_is_cut_holds_no_added_token_and_says_the_same(tokenizer: Any, text: str) -> None:
    cut = guarded([(text, True)], token_names(tokenizer))
    ids = encode_target(tokenizer, cut)
    names = ("</s>", "<s>", "<s>more", "<|a|>", "|>b", "<<", "<<e>", "<User>")
    assert not {tokenizer.convert_tokens_to_ids(name) for name in names} & {*ids}
    assert tokenizer.decode(ids) == text.replace(CUT, "") == without_cuts(cut) == "".join(pieces_of(cut))
    if CUT not in text and "<User>" not in text:
        assert ids == tokenizer(text, split_special_tokens=True)["input_ids"]


def test_a_text_without_names_of_tokens_is_left_as_it_is(tokenizer: Any) -> None:
    names = token_names(tokenizer)
    assert guarded([(f"a {CUT} b", True)], names) == f"a {CUT} b" and guarded([("</s>", True)], None) == "</s>"
    assert token_names(object()) is None and guarded([], names) == ""
    assert guarded([("so </s> it", True)], names) == f"so </{CUT}s> it"
    assert guarded([("<h1>so</h1>", True)], names) == "<h1>so</h1>"  # a word of the vocabulary
    assert guarded([("a <User> b</s>", True)], special_names(tokenizer)) == f"a <User> b</{CUT}s>"
    assert guarded([("so   it\t\n#", True)], names) == "so   it\t\n#"  # spaces and single signs are let through


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("<s>[so] </s>", "<s>so </s>"),  # the template's own words
        ("<s>[</s>]</s>", "<s></^s></s>"),
        ("[</][s>]", "</^s>"),  # two values
        ("[<]/[s>] it", "<^/s> it"),  # values and words
        ("<[/s]>", "<^/s>"),
        ("<[]/s>", "<^/s>"),  # words that only an empty value joins
        ("<|a[|>]", "<|a^|>"),
        ("<|a|>[b]", "<|a|>^b"),  # one that begins in the template's own token
        ("<s[>more]", "<s^>more"),
        ("<s>[more]", "<s>^more"),
        ("[<<e]></s>", "<^<e></s>"),  # its signs are a name, too
        ("[<]</s>", "<^</s>"),
        ("[<s>mor]e <s>", "<^s>more <s>"),
    ],
)
def test_names_that_touch_a_value_are_cut_and_no_others(tokenizer: Any, parts: str, expected: str) -> None:
    split = [(part.strip("[]"), part.startswith("[")) for part in re.split(r"(\[[^]]*\])", parts)]
    assert guarded(split, token_names(tokenizer)) == expected.replace("^", CUT)


def test_values_of_any_words_make_no_tokens(tokenizer: Any) -> None:
    names, draw = token_names(tokenizer), random.Random(0)
    assert names is not None
    for _ in range(2000):
        words = ["".join(draw.choices("<s>|/ab", k=draw.randrange(6))) for _ in range(5)]
        parts = [(each, bool(draw.randrange(2))) for each in words]
        values = {at for at, is_value in enumerate(v for each, v in parts for _ in each) if is_value}
        at = 0
        for piece in pieces_of(guarded(parts, names)):
            for start in range(len(piece)):
                for end in range(start + 2, len(piece) + 1):
                    if names.fullmatch(piece, start, end):
                        assert not values & {*range(at + start, at + end)}, parts
            at += len(piece)


@pytest.mark.parametrize("text", ["</s>" * 60_000, "".join(f"</s>{n:05d}" for n in range(10_000)), "<" * 200_000])
def test_many_names_are_few_calls_of_the_tokenizer(tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, encode = [], tokens._encode_all

    def counted(*given: Any) -> dict[str, list[int]]:
        sizes.append(sum(map(len, given[1])))
        return encode(*given)

    monkeypatch.setattr(tokens, "_encode_all", counted)
    encode_target(tokenizer, guarded([(text, True)], token_names(tokenizer)))
    assert len(sizes) <= 4 and sum(sizes) <= 6 * len(text)

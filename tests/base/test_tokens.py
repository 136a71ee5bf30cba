"""Between texts and token ids, with tokenizers that put something around a text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lightning_softprompt import SoftPromptError
from lightning_softprompt.base.guarded_text import guarded, token_names
from lightning_softprompt.base.tokens import (
    check_ids,
    encode_alone,
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


def sentencepiece(adds_space: bool, by_normalizer: bool) -> PreTrainedTokenizerFast:
    """Pieces of which a space in front is part, as Llama 2 has them."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        ":",
        "f",
        "o",
        "p",
        "s",
        "\u2581f",
        "\u2581p",
        "\u2581fo",
        "\u2581po",
        "po",
        "\n",
    ]
    merges = [("\u2581", "f"), ("\u2581", "p"), ("\u2581f", "o"), ("\u2581p", "o"), ("p", "o")]
    inner = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    if by_normalizer:
        steps = [normalizers.Prepend("\u2581")] if adds_space else []
        inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    else:
        scheme = "always" if adds_space else "never"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="always" if adds_space else "never")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("by_normalizer", [False, True])
@pytest.mark.parametrize("adds_space", [False, True])
def test_a_target_stands_behind_its_text_without_a_space_of_its_own(adds_space: bool, by_normalizer: bool) -> None:
    tokenizer = sentencepiece(adds_space, by_normalizer)
    names = tokenizer.convert_ids_to_tokens
    assert names(encode_target(tokenizer, " po")) == ["\u2581po"]
    assert names(encode_target(tokenizer, "po")) == ["po"] and names(encode_target(tokenizer, "\nfo")) == [
        "\n",
        "f",
        "o",
    ]
    assert names(encode_alone(tokenizer, "po")) == (["\u2581po"] if adds_space else ["po"])
    for target in (" po", "po", "  fo", "\npo", ":"):
        ids = [*encode_alone(tokenizer, "fo:"), *encode_target(tokenizer, target)]
        assert ids == encode_alone(tokenizer, "fo:" + target)
    assert encode_target(tokenizer, "") == []


def test_a_target_has_no_start_token_of_its_own() -> None:
    tokenizer = word_tokenizer(["a", "b", ":"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("b ")  # even where no special tokens are asked for
    b, a = tokenizer.convert_tokens_to_ids(["b", "a"])
    assert encode_alone(tokenizer, "a") == [b, a] and encode_target(tokenizer, "a a") == [a, a]
    assert encode_target(word_tokenizer(["a"]), "what it does not know") == [3] * 5
    whole = Tokenizer(models.WordLevel({"<unk>": 0, "good": 1}, unk_token="<unk>"))  # a text is one word
    assert encode_target(PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>"), "good") == [1]


def test_a_chat_template_without_a_system_says_so_in_one_line(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role\\n not supported') }}{% endif %}so"
    )
    with pytest.raises(SoftPromptError) as caught:
        encode_chat(tokenizer, "a", "b")
    assert str(caught.value).startswith(
        "the tokenizer's chat template takes no words of the system (System role not supported); leave the system out"
    )
    assert encode_chat(tokenizer, "a") == [SO]
    for template, told in (("{{ messages[0].what.ever }}", "has no attribute"), ("{% if %}", "Expected an expression")):
        tokenizer.chat_template = template
        with pytest.raises(SoftPromptError, match=f"cannot take these messages .*{told}") as caught:
            encode_chat(tokenizer, "a", "b")
        assert "\n" not in str(caught.value)


def test_what_stands_around_a_text_stands_around_one_that_is_cut(tokenizer) -> None:
    names = token_names(tokenizer)
    text = "a <eos> b"
    plain = [*encode_alone(tokenizer, "a <"), *encode_target(tokenizer, "eos> b")]
    assert encode_text(tokenizer, guarded([(text, True)], names)) == [BOS, *plain]
    tokenizer.eos_token = None  # as of an encoder's tokenizer, whose end is part of the text
    assert encode_text(tokenizer, "a b") == [BOS, A, B, EOS]
    assert encode_text(tokenizer, guarded([(text, True)], names)) == [BOS, *plain, EOS]


def test_a_chat_template_completes_no_token_of_what_is_said(tokenizer) -> None:
    names = token_names(tokenizer)
    tokenizer.chat_template = "<bos> {% for turn in messages %}<{{ turn.content | trim }}os> {% endfor %}so"
    assert encode_chat(tokenizer, "e").count(EOS) == 1
    found = encode_chat(tokenizer, " e ", names=names)
    assert EOS not in found and found[0] == BOS and found[-1] == SO
    assert encode_chat(tokenizer, " a ", names=names) == encode_chat(tokenizer, "a")
    tokenizer.chat_template = "{% if messages[0].content.startswith('a') %}b {% endif %}{{ messages[0].content }}"
    assert encode_chat(tokenizer, "a", names=names) == [B, A]

"""Special tokens in a user's text, which stay text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_softprompt.base.guarded_text import CUT, encode_pieces, guarded, special_tokens, without_cuts
from lightning_softprompt.base.tokens import encode_alone, encode_target


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes, three special tokens of which one begins another, and an added token that is not special."""
    inner = Tokenizer(models.BPE({sign: at for at, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")
    made.add_special_tokens({"additional_special_tokens": ["<s>more", "#", "<|a|>", "|>b", "<<", "<<e>"]})
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


@pytest.mark.parametrize(
    "text",
    [
        "so </s> it ends",
        "<s><s></s>",
        "<<s>more</s",
        "<s>more",
        "a <think> b",
        "</s>",
        "<|a|>b",
        "<<e> <<<e>",
        f"</{CUT}s>",
        f"</s>{CUT}<{CUT}/s>",
        "plain",
        "",
    ],
)
def test_what_is_cut_holds_no_special_token_and_says_the_same(tokenizer: Any, text: str) -> None:
    cut = guarded(text, special_tokens(tokenizer))
    ids = encode_pieces(
        cut, lambda piece: encode_alone(tokenizer, piece), lambda piece: encode_target(tokenizer, piece)
    )
    special = {
        tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<s>", "<s>more", "<|a|>", "|>b", "<<", "<<e>")
    }
    assert not special & {*ids}
    assert tokenizer.decode(ids) == text.replace(CUT, "") == without_cuts(cut)
    assert ("<think>" in text) == (tokenizer.convert_tokens_to_ids("<think>") in ids)
    if CUT not in text:
        assert ids == tokenizer(text, split_special_tokens=True)["input_ids"]


def test_a_text_without_special_tokens_is_left_as_it_is(tokenizer: Any) -> None:
    tokens = special_tokens(tokenizer)
    assert guarded(f"a {CUT} b", tokens) == f"a {CUT} b" and guarded("</s>", None) == "</s>"
    assert special_tokens(object()) is None
    assert guarded("so </s> it", tokens) == f"so </{CUT}s> it"

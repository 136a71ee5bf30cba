"""A tokenizer of whole words, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One id a word or sign; 0 begins, 1 pads, 2 ends and 3 is unknown."""
    vocabulary = {word: index for index, word in enumerate(["<bos>", "<pad>", "<eos>", "<unk>", *dict.fromkeys(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )

"""A user's text in which the tokenizer's special tokens stay text.

A text that says `<|im_end|>` or `</s>` would end a turn or a document where the tokenizer reads that as its token
(https://github.com/huggingface/transformers/issues/29279). So the text is cut in the middle of the token's name, and
its pieces are encoded one by one. A tokenizer is never changed for this, because other threads use it, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

# Where a text is cut. Unicode keeps this character free for such uses, so it stands in no text.
CUT = "\ufdd0"


def special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds the names of a tokenizer's special tokens in a text; None if it has none of several characters."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    names = {str(token) for token in added.values() if token.special} | {*getattr(tokenizer, "all_special_tokens", ())}
    return _pattern(frozenset(name for name in names if len(name) > 1))


@lru_cache(maxsize=64)
def _pattern(names: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first))) if names else None


def guarded(text: str, tokens: re.Pattern[str] | None) -> str:
    r"""A text with a `CUT` inside each name of a special token, behind the signs that it begins with.

    Args:
        text: what a user wrote.
        tokens: as `special_tokens` gives them; None leaves the text as it is.

    Example:
        >>> guarded("so </s> it ends", re.compile("</s>")).replace(CUT, "|")
        'so </|s> it ends'
    """
    pieces = []
    while tokens is not None and (found := tokens.search(text)) is not None:
        place = found.start() + _behind_signs(found[0])
        pieces.append(guarded(text[:place], tokens))  # a shorter name may end there
        text = text[place:]  # and one may begin inside the one that was found
    return CUT.join([*pieces, text])


def _behind_signs(name: str) -> int:
    """Where a name is cut: behind its first signs, as most tokenizers split texts there, too."""
    return next((place for place, character in enumerate(name) if place and character.isalnum()), 1)


def encode_pieces(
    text: str, encode_first: Callable[[str], list[int]], encode_next: Callable[[str], list[int]]
) -> list[int]:
    """The ids of a text that may have been cut: of its first piece, and behind it of each other one."""
    first, *others = text.split(CUT)
    return [*encode_first(first), *(token for piece in others for token in encode_next(piece))]


def without_cuts(text: str) -> str:
    """The text as the user wrote it, for messages."""
    return text.replace(CUT, "")

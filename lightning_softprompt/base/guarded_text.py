"""A text in which the names of a tokenizer's special tokens stay text wherever they touch what a user wrote.

A value that says `<|im_end|>` or `</s>` would end a turn or a document where the tokenizer reads that as its token
(https://github.com/huggingface/transformers/issues/29279), and so would a value that completes such a name together
with another value or with the words around it. So the whole text is searched once, it is cut inside each name that
touches a value, and its pieces are encoded one by one. A tokenizer is never changed for this, because other threads use
it, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

# Where a text is cut. Unicode keeps this character free for such uses, so it stands in no text.
CUT = "\ufdd0"

# Words of a text, and whether they are a value, that is, whether a user wrote them.
Part = tuple[str, bool]


def token_names(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds the names of tokens that a text of a row or a client must not hold; None if there are none.

    These are the special tokens, and of the others that were added those that the chat template writes: turns begin
    with tokens that some tokenizers, as DeepSeek's, do not call special. Tokens that stand for words, as those of HTML
    in Gemma's vocabulary, are read as ever.
    """
    written = str(getattr(tokenizer, "chat_template", None) or "")
    return _pattern(_special(tokenizer) | {name for name in _added(tokenizer) if _has_signs(name) and name in written})


def special_names(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds the names of special tokens alone, for targets, which may hold `<think>`; None if there are none."""
    return _pattern(_special(tokenizer))


def _special(tokenizer: Any) -> frozenset[str]:
    names = {str(each) for each in _added(tokenizer).values() if each.special}
    return frozenset(filter(_has_signs, names | {*getattr(tokenizer, "all_special_tokens", ())}))


def _added(tokenizer: Any) -> dict[str, Any]:
    return {str(token): token for token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).values()}


def _has_signs(name: str) -> bool:
    """Whether a name can be cut, and is no run of spaces, tabs or newlines, which some tokenizers add."""
    return len(name) > 1 and bool(name.strip(" \t\r\n\u2581"))


@lru_cache(maxsize=64)
def _pattern(names: frozenset[str]) -> re.Pattern[str] | None:
    return re.compile(_expression(names)) if names else None


def _expression(names: Collection[str]) -> str:
    """A regular expression that branches where names differ: to try thousands of them takes no longer than a few."""
    begun: dict[str, list[str]] = {}
    for name in sorted(filter(None, names)):
        begun.setdefault(name[0], []).append(name)
    ways = []
    for alike in begun.values():
        differ = [one != other for one, other in zip(alike[0], alike[-1], strict=False)]  # they are sorted
        size = differ.index(True) if True in differ else len(differ)
        ways.append(re.escape(alike[0][:size]) + _expression([name[size:] for name in alike]))
    return f"(?:{'|'.join(ways)})" + ("?" if "" in names else "") if ways else ""


def guarded(parts: Iterable[Part], names: re.Pattern[str] | None) -> str:
    r"""A text with a `CUT` inside each name of a token that touches a value. The other words keep their tokens.

    Args:
        parts: the text in its order.
        names: as `token_names` gives them; None cuts nothing.

    Example:
        >>> parts = [("<s> so ", False), ("</s> it ends", True)]
        >>> guarded(parts, re.compile("<s>|</s>")).replace(CUT, "|")
        '<s> so </|s> it ends'
    """
    parts = [*parts]
    text = "".join(words for words, _ in parts)
    places = [0, *([] if names is None else _cuts(text, [*_spans(parts)], names)), len(text)]
    return CUT.join(text[start:end] for start, end in pairwise(places))


def _spans(parts: Iterable[Part]) -> Iterator[tuple[int, int]]:
    """Where each value begins and ends in the text."""
    start = 0
    for words, is_value in parts:
        if is_value:
            yield start, start + len(words)
        start += len(words)


def _cuts(text: str, values: list[tuple[int, int]], names: re.Pattern[str]) -> Iterator[int]:
    """Where a text is cut: at the edge of a value that stands in a name, or else inside the name."""
    at, position = 0, 0
    while at < len(values) and (found := names.search(text, position)) is not None:
        start, end = found.span()
        while at < len(values) and values[at][1] <= start:
            at += 1
        if at == len(values):
            return
        first, last = values[at]
        if end <= first:  # the words around the values say it, but a name that begins inside it may touch a value
            position = start + 1
            continue
        place = first if first > start else min(start + _behind_signs(found[0]), last)
        if first <= start and names.search(text, start, place):  # its signs are a name, too
            place = start + 1
        yield place
        position = place


def _behind_signs(name: str) -> int:
    """Where a name is cut: behind its first signs, as most tokenizers split texts there, too."""
    return next((place for place, character in enumerate(name) if place and character.isalnum()), 1)


def pieces_of(text: str) -> list[str]:
    """The pieces of a text that may be `guarded`; each of them is encoded by itself."""
    return [piece for piece in text.split(CUT) if piece] or [""]


def without_cuts(text: str) -> str:
    """The text as the user wrote it, for messages."""
    return text.replace(CUT, "")

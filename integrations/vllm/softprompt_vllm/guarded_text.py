"""A client's text in which the names of a tokenizer's special tokens stay text, as the library has it in training.

It is the library's `base/guarded_text.py` once more, and its `ids_behind`, because this distribution imports nothing of
it. A test holds both to the same ids.
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
    """What finds the names of tokens that a client's text must not hold; None if there are none.

    These are the special tokens, and of the others that were added those that the chat template writes: turns begin
    with tokens that some tokenizers do not call special. Names of one character, which cannot be cut, and runs of
    spaces, tabs or newlines, which some tokenizers add, do not count.
    """
    added = {str(token): token for token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).values()}
    written = str(getattr(tokenizer, "chat_template", None) or "")
    names = {name for name, token in added.items() if token.special or name in written}
    names |= {*getattr(tokenizer, "all_special_tokens", ())}
    return _pattern(frozenset(name for name in names if len(name) > 1 and name.strip(" \t\r\n\u2581")))


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
    """A text with a `CUT` inside each name of a token that touches a value. The other words keep their tokens."""
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


def ids_behind(tokenizer: Any, pieces: list[str]) -> list[int]:
    """The ids of pieces behind a text, where no tokenizer puts a space or a start token in front of them."""
    found = _ids_of(tokenizer, {*pieces})
    candidates = {text: [ids] for text, ids in found.items()}  # two that are equal are right
    for front in (":", "a", "\n"):
        fronts = _ids_of(tokenizer, [front, *(front + text for text in candidates)] if candidates else [])
        for text, known in [*candidates.items()]:
            head, whole = fronts[front], fronts[front + text]
            behind = whole[len(head) :]
            if whole[: len(head)] == head and behind:
                if behind in known:
                    found[text] = behind
                    del candidates[text]
                known.append(behind)
    return [token for piece in pieces for token in found[piece]]


def _ids_of(tokenizer: Any, texts: Collection[str]) -> dict[str, list[int]]:
    listed, inner = [*texts], getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None and inner.truncation is None and inner.padding is None and not inner.encode_special_tokens:
        found = inner.encode_batch_fast(listed, add_special_tokens=False)
        return {text: list(each.ids) for text, each in zip(listed, found, strict=True)}
    return {text: list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in listed}

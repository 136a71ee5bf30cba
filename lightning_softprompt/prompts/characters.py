"""Control characters: which texts hold them, and how such a text is shown without them.

A terminal obeys control characters, so prompts that come from elsewhere must not bring them into what is printed.
"""

from __future__ import annotations

import unicodedata

_LONGEST = 200


def is_control(character: str) -> bool:
    """Whether a character is a control character or half of a surrogate pair, which no file can hold."""
    return unicodedata.category(character) in ("Cc", "Cs")


def has_control(text: str, allowed: str = "") -> bool:
    r"""Whether a text holds a control character other than those in `allowed`.

    Example:
        >>> has_control("two\nlines"), has_control("two\nlines", allowed="\n"), has_control("Größe")
        (True, False, False)
    """
    return any(is_control(character) and character not in allowed for character in text)


def without_control(text: str) -> str:
    r"""The text with each control character written as its escape sequence.

    Example:
        >>> print(without_control("two\nlines"))
        two\nlines
    """
    return "".join(repr(character)[1:-1] if is_control(character) else character for character in text)


def shown(value: object) -> str:
    """A value as an error shows it: its `repr`, which holds no control characters, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

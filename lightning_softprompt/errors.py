"""The library's one error class, and what many errors need: checks of arguments, and the name that was meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_args


class SoftPromptError(ValueError):
    """An error that the user can correct: the message says what was expected, what was found and what to do."""


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a `SoftPromptError` unless `value` is one of the words of `choices`, a `typing.Literal`.

    Example:
        >>> from typing import Literal
        >>> check_choice("prefix", "sometimes", Literal["always", "never"])
        Traceback (most recent call last):
        lightning_softprompt.errors.SoftPromptError: prefix must be one of 'always', 'never', got 'sometimes'
    """
    if value not in get_args(choices):
        raise SoftPromptError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_at_least_one(**numbers: int) -> None:
    """Raise a `SoftPromptError` if one of these numbers is below 1. Each is given by the name of its argument."""
    for name, number in numbers.items():
        if number < 1:
            raise SoftPromptError(f"{name} must be at least 1, got {number!r}")


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A question about the known name that is most like `name`; `otherwise` if none is like it.

    Example:
        >>> nearest("sorce", ["source", "opinion"])
        "do you mean 'source'?"
    """
    found = get_close_matches(name, list(known), 1)
    return f"do you mean {found[0]!r}?" if found else otherwise

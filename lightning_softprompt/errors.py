"""The library's one error class, and the checks of arguments that many places need."""

from __future__ import annotations

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

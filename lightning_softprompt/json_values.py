"""JSON texts in and out, with each number as it is written."""

from __future__ import annotations

import json
import math
from typing import Any

from lightning_softprompt.errors import SoftPromptError

# No data is expected to nest deeper. What writes, compares and copies values could not do it at any depth.
_DEEPEST = 100


class Number(float):
    """A number that Python would write otherwise than the JSON text it was read from, such as 3.10, 1e5 or NaN.

    It is a float, and its text is what stands in the file.

    Example:
        >>> number = Number("3.10")
        >>> number + 1, f"{number}"
        (4.1, '3.10')
    """

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Number:
        """The number that a text stands for."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __repr__(self) -> str:
        """The number as it was read."""
        return self.text

    def __str__(self) -> str:
        """The number as it was read."""
        return self.text

    def __format__(self, spec: str) -> str:
        """The number as it was read, or as a format says."""
        return super().__format__(spec) if spec else self.text


def loads(text: str) -> Any:
    """The value of a JSON text. A number that Python would write otherwise is a `Number`.

    Raises:
        ValueError: a text that is not JSON. An object that holds a key twice raises a `SoftPromptError`, which is one.
        RecursionError: a value that is nested more than a hundred deep, which not all that writes values could write.

    Example:
        >>> loads('{"version": 3.10, "code": "00501", "stars": 5}')
        {'version': 3.10, 'code': '00501', 'stars': 5}
    """
    value = _DECODER.decode(text)
    if text.count("[") + text.count("{") > _DEEPEST:  # only then it may be nested deeper
        _check_depth(value)
    return value


def dumps(value: Any, ensure_ascii: bool = False) -> str:
    """The JSON text of a value. A number that is not finite is null, and a value that JSON does not know is its text.

    Args:
        value: what to write.
        ensure_ascii: whether to write all but ASCII characters as escape sequences.

    Example:
        >>> dumps({"version": Number("3.10"), "loss": float("nan")})
        '{"version": 3.10, "loss": null}'
    """
    if isinstance(value, dict):
        pairs = (f"{dumps(str(name), ensure_ascii)}: {dumps(each, ensure_ascii)}" for name, each in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(dumps(each, ensure_ascii) for each in value) + "]"
    if isinstance(value, Number) and value.text[-1].isdigit():  # all but NaN and Infinity, also beyond any float
        return value.text
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return json.dumps(value, ensure_ascii=ensure_ascii, default=str)


def _check_depth(value: Any) -> None:
    level, depth = [value], -1
    while level:
        held = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level, depth = [each for values in held for each in values], depth + 1
    if depth > _DEEPEST:
        raise RecursionError(f"it is nested {depth} deep")


def _decimal(text: str) -> float:
    number = float(text)
    return number if repr(number) == text else Number(text)


def _whole(text: str) -> int | float:
    if text == "-0" or len(text) > 4000:  # Python reads no more than 4,300 digits as a whole number
        return Number(text)
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise SoftPromptError(f"the key {twice!r} stands in it twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_decimal, parse_int=_whole, parse_constant=Number)

"""A command line as people write it, made into what the parser reads: flags without a value, and plain lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import yaml


def flags_and_lists(function: Callable[..., Any]) -> tuple[set[str], set[str]]:
    """The options of a command's function that are true or false, and those that are lists of texts."""
    kinds = {f"--{name}": str(each.annotation) for name, each in inspect.signature(function).parameters.items()}
    return (
        {option for option, kind in kinds.items() if kind == "bool"},
        {option for option, kind in kinds.items() if kind.startswith("list[str]")},
    )


def with_values(arguments: Sequence[str], flags: Collection[str], lists: Collection[str] = ()) -> list[str]:
    """The arguments, in which each flag without a value is true, and the values of a list stand in one argument.

    A list may also be written as the parser reads it, in brackets.

    Example:
        >>> with_values(["--folders", "a", "b", "--json"], ["--json"], ["--folders"])
        ['--folders=["a", "b"]', '--json=true']
    """
    made, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        option, sign, value = argument.partition("=")
        if option in lists:
            values = [value] if sign else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            is_written_out = len(values) == 1 and values[0].startswith("[")
            argument = option if not values else f"{option}={values[0] if is_written_out else _list(values)}"
        elif argument in flags and (not rest or rest[0].startswith("-")):
            argument = f"{argument}=true"
        made.append(argument)
    return made


def _list(values: Sequence[str]) -> str:
    """Texts as a list that the parser, which reads YAML, reads as these texts, whatever is in them."""
    return yaml.safe_dump(values, default_style='"', default_flow_style=True, width=float("inf")).strip()

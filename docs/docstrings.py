"""How the reference reads docstrings: examples are code, and the functions of commands are shown as commands."""

from __future__ import annotations

import re
from typing import Any

import griffe

_COMMANDS = "lightning_softprompt.cli."


class Docstrings(griffe.Extension):
    """Griffe reads `Examples:` as code, and takes `Example:` for a note whose prompts are quotations."""

    def on_instance(self, *, obj: griffe.Object, **more: Any) -> None:
        """Give the section the name that Griffe reads."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value)

    def on_function_instance(self, *, func: griffe.Function, **more: Any) -> None:
        """A function of a command has a template of its own (`templates/python/material/command.html.jinja`)."""
        if func.path.startswith(_COMMANDS):
            func.extra["mkdocstrings"]["template"] = "command.html.jinja"

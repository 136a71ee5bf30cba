"""Printing and writing the results of commands: JSON or words, tables, and files with one JSON line per row."""

from __future__ import annotations

import json as json_format
import math
from pathlib import Path
from typing import Any, TextIO

from lightning_softprompt.prompts.folder import write_atomically


def say(done: dict[str, Any], json: bool, text: str = "", file: TextIO | None = None) -> None:
    """Print what a command did, as JSON or in words. In JSON, numbers that are not finite become null."""
    print(json_format.dumps(_strict(done), ensure_ascii=False, allow_nan=False) if json else text, file=file)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table with the names of their columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in rows[0] if rows else ():
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console().print(table, markup=False)


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file with one JSON line per row. Nobody ever reads half of it."""
    # A value that JSON does not know is written as text, such as the date that `datasets` makes from a file's text.
    text = "".join(json_format.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())

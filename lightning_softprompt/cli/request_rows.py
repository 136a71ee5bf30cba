"""The rows of an input file, each of which is a request or says why it is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_softprompt.data.sources import Source
from lightning_softprompt.errors import SoftPromptError


@dataclass
class RequestRow:
    """One row of an input file.

    Attributes:
        where: file and line, as errors name the row.
        columns: the row as it stands in the file, without what an earlier run has added to it.
        error: why the row cannot be answered; empty where it can.
    """

    where: str
    columns: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def read_request_rows(path: str, tasks: tuple[str, ...], added: tuple[str, ...]) -> list[RequestRow]:
    """Read all rows of a JSONL file, or of another file that `Source` reads.

    A JSONL file is read line by line, so that a line that is no row stops no other one. Its values stand as they are.

    Args:
        path: the file.
        tasks: the tasks that are known.
        added: the names of columns that the command adds.

    Raises:
        SoftPromptError: a file that is missing or has no rows.
    """
    if Path(path).suffix.lower() not in (".jsonl", ".json"):
        rows = [RequestRow(where, row) for where, row in Source(path).rows("input")]
    elif not Path(path).is_file():
        raise SoftPromptError(f"the input {path} does not exist; looked in {Path.cwd()}")
    else:
        rows = list(_lines(Path(path)))
    if not rows:
        raise SoftPromptError(f"the input {path} is empty; it needs at least one row")
    for row in rows:
        row.columns = {name: value for name, value in row.columns.items() if name not in added}
        row.error = row.error or _reason_against(row, tasks)
    return rows


def _lines(path: Path) -> Iterator[RequestRow]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        row = RequestRow(f"{path}, line {number}")
        try:
            found = json.loads(line.decode(), object_pairs_hook=_without_repeats)
        except RecursionError:
            row.error = f"{row.where}: the JSON is nested too deep; make it flat"
        except ValueError as error:
            row.error = f"{row.where}: expected one JSON object a line ({error})"
        else:
            row.columns = found if isinstance(found, dict) else {}
            row.error = "" if isinstance(found, dict) else f"{row.where}: expected a JSON object, found {found!r:.100}"
        yield row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise SoftPromptError(f"the key {twice!r} stands in it twice")
    return found


def _reason_against(row: RequestRow, tasks: tuple[str, ...]) -> str:
    known = ", ".join(map(repr, tasks))
    if "task" not in row.columns:
        return f"{row.where}: there is no task; known tasks: {known}; null is no prompt"
    task = row.columns["task"]
    if task is not None and (not isinstance(task, str) or task not in tasks):
        return f"{row.where}: unknown task {task!r:.100}; known tasks: {known}"
    return ""

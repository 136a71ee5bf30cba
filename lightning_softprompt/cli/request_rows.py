"""The rows of an input file, each of which is a request or says why it is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_softprompt.data.sources import Source
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.templates import value_text


@dataclass
class RequestRow:
    """One row of an input file.

    Attributes:
        where: file and line, as errors name the row.
        given: the row as it stands in the file, with its task.
        task: the name of its task; None for no prompt.
        columns: what of it is written again: all but the columns that the command adds, as an earlier run did, too.
        error: why the row cannot be answered; empty where it can.
    """

    where: str
    given: dict[str, Any] = field(default_factory=dict)
    task: str | None = field(init=False, default=None)
    columns: dict[str, Any] = field(init=False, default_factory=dict)
    error: str = ""


def read_request_rows(
    path: str, tasks: tuple[str, ...], added: tuple[str, ...], task_column: str = "task"
) -> list[RequestRow]:
    """Read all rows of a file, as `Source` reads them. A row that cannot be read stops no other one.

    Where one task alone is known, the rows of a file without a column `task` are of that task.

    Args:
        path: the file.
        tasks: the tasks that are known.
        added: the names of columns that the command adds.
        task_column: the column that names a row's task.

    Raises:
        SoftPromptError: a file that is missing or has no rows.
    """
    rows = [
        RequestRow(where, error=str(found)) if isinstance(found, SoftPromptError) else RequestRow(where, found)
        for where, found in Source(path).attempts("input")
    ]
    names_none = len(tasks) == 1 and task_column == "task" and not any("task" in row.given for row in rows)
    for row in rows:
        if names_none and not row.error:
            row.given["task"] = tasks[0]
        row.columns = {name: value for name, value in row.given.items() if name not in added}
        row.error = row.error or _reason_against(row, tasks, task_column)
    return rows


def _reason_against(row: RequestRow, tasks: tuple[str, ...], task_column: str) -> str:
    known = ", ".join(map(repr, tasks))
    if task_column not in row.given:
        hint = "; where another column names it, give --task_column" if task_column == "task" else ""
        return f"{row.where}: there is no task; give it a {task_column!r}, one of {known}, or null for no prompt{hint}"
    task = row.given[task_column]
    if task is not None:
        row.task = value_text(task)  # a name of digits is a number in JSON lines and Parquet
        if row.task not in tasks:
            return f"{row.where}: unknown task {task!r:.100}; known tasks: {known}"
    return ""

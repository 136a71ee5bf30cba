"""Printing and writing the results of commands: JSON or words, tables, and files with one JSON line per row."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lightning_softprompt.cli.terminal import printable
from lightning_softprompt.data.files import is_among
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.json_values import dumps, loads
from lightning_softprompt.prompts.files import write_atomically


def say(done: dict[str, Any], json: bool, text: str = "", file: TextIO | None = None, flush: bool = False) -> None:
    """Print what a command did, as JSON or in words, without control characters.

    In JSON, numbers that are not finite become null, and characters that the encoding lacks are escaped.
    """
    print(_json(done, file or sys.stdout) if json else printable(text), file=file, flush=flush)


def _json(done: dict[str, Any], file: TextIO | None) -> str:
    text = _with_escapes(dumps(done))
    try:
        text.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return _with_escapes(dumps(done, ensure_ascii=True))
    return text


def _with_escapes(text: str) -> str:
    """JSON whose control characters and halves of surrogate pairs are escaped; `json` leaves some as they are."""
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table with the names of their columns; what is in it stands as it is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)))
    for column in rows[0] if rows else ():
        table.add_column(Text(printable(column.replace("_", " "))), overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(_shown(value))) for value in row.values()))
    Console().print(table)


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def progress_bar(label: str, total: int, done: int, unit: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error, beside what a command prints; yields a function that advances it.

    The function takes how much was done, and another label, if there is one.

    Args:
        label: what is being done.
        total: how much there is to do.
        done: how much of it is done already.
        unit: what is counted, as the rate says it: "rows".
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """How much is done in a second."""

        def render(self, task: Any) -> Text:
            return Text(f"{(task.completed - done) / task.elapsed:.3g} {unit}/s" if task.elapsed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=done)
        yield lambda count, label=label: progress.update(task, advance=count, description=label)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file with one JSON line per row. Nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, b"".join(map(_line, rows)))


def check_not_read(output: Path, *read: str) -> None:
    """Raise a `SoftPromptError` where an output is one of the files that are read, which would be lost."""
    for path in read:
        if is_among(output, path):
            raise SoftPromptError(f"{output} is one of the files that are read ({path}); give another output")


class RowWriter:
    """Writes rows as JSON lines as they come, so that whatever ends the process leaves those before.

    Args:
        path: the file. Its folder is made.
        resume: whether to go on behind the rows that the file holds. A half-written last line is cut off. Otherwise the
            first rows that are written replace an earlier file.

    Attributes:
        written: the rows that the file held before.

    Raises:
        OSError: a file that cannot be written.
        SoftPromptError: a file to go on with that holds something else than rows.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if resume and path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        try:
            self.written: list[dict[str, Any]] = [_row(line.decode()) for line in whole.splitlines()]
        except ValueError as error:
            raise SoftPromptError(f"{path} holds something else than rows ({error}); give another output") from error
        self._file = path.open("ab")
        # A pipe or a device holds nothing that could be cut off.
        self._kept: int | None = len(whole) if path.is_file() else None

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows, and give them to the system, which keeps them whatever becomes of this process."""
        if self._kept is not None:
            self._file.truncate(self._kept)
            self._kept = None
        self._file.write(b"".join(map(_line, rows)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _row(line: str) -> dict[str, Any]:
    row = loads(line)
    if not isinstance(row, dict):
        raise SoftPromptError(f"expected a JSON object, found {row!r:.100}")
    return row


def _line(row: dict[str, Any]) -> bytes:
    return (_with_escapes(dumps(row)) + "\n").encode()

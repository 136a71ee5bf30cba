"""Where rows come from: files, and data sets on the hub, which the library `datasets` reads."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_softprompt.data.files import (
    FORMATS,
    Reading,
    files_of,
    format_of,
    read_file,
    rendered,
    to_be_rendered,
)
from lightning_softprompt.errors import SoftPromptError


@dataclass
class Source:
    """The rows of a file, of the files that a pattern matches, or of a data set on the hub.

    The values of a file stand as they are written in it, whether it is held or streamed: `00501`, `3.10`, `true`,
    `None` and dates. A file is read anew each time, and no copy of it is kept.

    Args:
        path: a file (`.jsonl`, `.csv`, `.tsv`, also with `.gz` behind it, or `.parquet`), in UTF-8; or the id of a data
            set on the hub. A file of that very name is that file, whatever signs the name holds. If there is none, a
            name with `*`, `?` or `[…]` stands for all files that it matches, in the order of their names.
        task: the task of all rows; None means that a column names each row's task (`TaskDataModule(task_column=…)`).
        split: the split of a hub data set; None means the split of the stage (train, validation, test, predict).
        config: the configuration of a hub data set.
        streaming: whether to read rows only when they are needed, for data that fit neither memory nor disk. Streamed
            training rows are shuffled in a buffer of ten thousand. If one training source is streamed, all are. Rows of
            other splits are kept in memory as token ids.
        num_rows: how many rows an epoch takes of a streamed training source; the next epoch takes the rows behind them.
            The source's share of the epoch is computed from this number. None means all rows, as the hub tells their
            number or as they are counted in a file. Of other splits only the first `num_rows` rows are read.
    """

    path: str
    task: str | None = None
    split: str | None = None
    config: str | None = None
    streaming: bool = False
    num_rows: int | None = None

    def __post_init__(self) -> None:
        """Take a `Path`, too."""
        self.path = str(self.path)

    def check(self) -> None:
        """Raise a `SoftPromptError` if the arguments do not fit together."""
        if self.num_rows is not None and (self.num_rows < 1 or not self.streaming):
            raise SoftPromptError(f"num_rows must be at least 1 and belongs to streaming=True, got {self}")

    def rows(self, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """All rows, each with its name in errors: file and line, or the row's number where there are no lines.

        Raises:
            SoftPromptError: a source that is missing, empty or cannot be read, or a row that cannot be read.
        """
        for where, row in self.attempts(stage):
            if isinstance(row, SoftPromptError):
                raise row
            yield where, row

    def attempts(self, stage: str) -> Reading:
        """As `rows`, but the reason why a row cannot be read comes in its place, and the other rows come all the same.

        Raises:
            SoftPromptError: a source that is missing, empty or cannot be read.
        """
        is_empty = True
        for where, row in islice(self._read(stage), self.num_rows):
            is_empty = False
            yield where, row
        if is_empty:
            raise self._no_rows(stage)

    def stream(self, stage: str) -> tuple[Any, int]:
        """The rows as a `datasets.IterableDataset`, and how many of them an epoch takes.

        Of a file, each row is a dict of its name in errors, `where`, and of the row or the reason against it, `row`.

        Raises:
            SoftPromptError: a source that is missing, empty, cannot be read, or does not tell its number of rows.
        """
        import datasets

        if self._is_file():
            data = datasets.IterableDataset.from_generator(_named_rows, gen_kwargs={"source": self, "stage": stage})
            data = data.skip(0)  # there are no shards to be shuffled, for each of which `datasets` starts a thread
            found = sum(1 for _ in islice(self._read(stage), 1 if self.num_rows else None))
            size = found and (self.num_rows or found)
        else:
            data = self._load(stage)
            size = self.num_rows or self._size(data, stage)
        if not size:
            raise self._no_rows(stage)
        return (data if self.streaming or self._is_file() else data.to_iterable_dataset()), size

    def of_stream(self, row: dict[str, Any], stage: str) -> tuple[str, dict[str, Any]]:
        """The name in errors of a row of `stream`, and its columns.

        Raises:
            SoftPromptError: a row that cannot be read.
        """
        if not self._is_file():
            return f"{self.name(stage)}, the row {row!s:.200}", row
        if isinstance(row["row"], SoftPromptError):
            raise row["row"]
        return row["where"], row["row"]

    def name(self, stage: str) -> str:
        """The name of this source in messages."""
        return self.path if self._is_file() else f"{self.path}[{self.split or stage}]"

    def _is_file(self) -> bool:
        return format_of(self.path) is not None or glob.has_magic(self.path) or Path(self.path).is_file()

    def _no_rows(self, stage: str) -> SoftPromptError:
        return SoftPromptError(f"{self.name(stage)} is empty; the {stage} split needs at least one row")

    def _read(self, stage: str) -> Reading:
        if self._is_file():
            for path in files_of(self.path, stage):
                yield from read_file(path)
        else:
            name = self.name(stage)
            for number, row in enumerate(read(self._load(stage), name), 1):
                yield f"{name}, row {number}", row

    def _size(self, data: Any, stage: str) -> int:
        if not self.streaming:
            return len(data)
        told = (data.info.splits or {}).get(str(data.split))
        if told is None:
            raise SoftPromptError(
                f"the hub does not say how many rows {self.name(stage)} has; give Source(num_rows=…): how many of them "
                "an epoch takes"
            )
        return told.num_examples

    def _load(self, stage: str) -> Any:
        import datasets

        options: dict[str, Any] = {"streaming": True} if self.streaming else {}
        try:
            return datasets.load_dataset(self.path, self.config, split=self.split or stage, **options)
        except Exception as error:
            raise SoftPromptError(
                f"{self.path!r} could not be loaded as the {stage} split: neither a file that ends in "
                f"{', '.join(FORMATS)} nor a data set the hub gave "
                f"({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error


# `Path` also tells jsonargparse that the text is a path, so that it does not put the file's content in its place.
Sources = str | Path | Source | list[str | Path | Source]


def sources_of(given: Sources | None) -> list[Source]:
    """One source or several, in any of the forms that may be given, as a list.

    Raises:
        SoftPromptError: something else, such as the rows themselves.
    """
    listed = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    wrong = next((each for each in listed if not isinstance(each, str | Path | Source)), None)
    if wrong is not None:
        raise SoftPromptError(f"a source is a file, a pattern, the id of a data set or a Source, got {wrong!r:.100}")
    return [source if isinstance(source, Source) else Source(str(source)) for source in listed]


def no_source(split: str) -> SoftPromptError:
    """The error where a run needs a split that nothing was given for."""
    return SoftPromptError(
        f"there is no {split} source; give TaskDataModule({split}=…), or data.init_args.{split} in a config"
    )


def read(data: Any, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set of `datasets`, as `files.rendered` gives them.

    Raises:
        SoftPromptError: a row that cannot be read; `name` names the data set in the message.
    """
    features = to_be_rendered(getattr(data, "features", None))
    rows = iter(data)
    while True:
        try:
            row = next(rows, None)
        except SoftPromptError:
            raise
        except Exception as error:  # readers and connections raise errors of many types
            raise SoftPromptError(f"{name} cannot be read: {error}") from error
        if row is None:
            return
        yield rendered(row, features)


def _named_rows(source: Source, stage: str) -> Iterator[dict[str, Any]]:
    for where, row in source._read(stage):
        yield {"where": where, "row": row}

"""Where rows come from: files and data sets on the hub, read by the library `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_softprompt.errors import SoftPromptError

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class Source:
    """The rows of one file or of one data set on the hub.

    Args:
        path: a `.jsonl`, `.csv` or `.parquet` file, or the id of a data set on the hub.
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

    def check(self) -> None:
        """Raise a `SoftPromptError` if the arguments do not fit together."""
        if self.num_rows is not None and (self.num_rows < 1 or not self.streaming):
            raise SoftPromptError(f"num_rows must be at least 1 and belongs to streaming=True, got {self}")

    def rows(self, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """All rows, each with its name in errors: file and line.

        Raises:
            SoftPromptError: a source that is missing, empty or cannot be read.
        """
        data, kind = self._load(stage)
        first = {"json": 1, "csv": 2}.get(kind, 1)
        if self.streaming:  # a stream is counted by rows, not by lines: it skips blank lines and the CSV header
            first = 1
        word = "row" if kind in ("parquet", "hub") or self.streaming else "line"
        index = None
        for index, row in enumerate(islice(read(data, self.name(stage)), self.num_rows)):
            yield f"{self.name(stage)}, {word} {index + first}", row
        if index is None:
            raise SoftPromptError(f"{self.name(stage)} is empty; the {stage} split needs at least one row")

    def stream(self, stage: str) -> tuple[Any, int]:
        """The rows as a `datasets.IterableDataset`, and how many of them an epoch takes.

        Raises:
            SoftPromptError: a source that is missing, empty, cannot be read, or does not tell its number of rows.
        """
        data, kind = self._load(stage)
        size = (not isinstance(data, list) and self.num_rows) or self._size(data, kind, stage)
        if not size:
            raise SoftPromptError(f"{self.name(stage)} is empty; the {stage} split needs at least one row")
        return (data if self.streaming else data.to_iterable_dataset()), size

    def _size(self, data: Any, kind: str, stage: str) -> int:
        if not self.streaming or isinstance(data, list):
            return len(data)
        if kind != "hub":
            return sum(1 for _ in read(data, self.name(stage)))
        told = (data.info.splits or {}).get(str(data.split))
        if told is None:
            raise SoftPromptError(
                f"the hub does not say how many rows {self.name(stage)} has; give Source(num_rows=…): how many of them "
                "an epoch takes"
            )
        return told.num_examples

    def name(self, stage: str) -> str:
        """The name of this source in messages."""
        return self.path if self._format() else f"{self.path}[{self.split or stage}]"

    def _format(self) -> str | None:
        return _FORMATS.get(Path(self.path).suffix.lower())

    def _load(self, stage: str) -> tuple[Any, str]:
        import datasets

        options: dict[str, Any] = {"streaming": True} if self.streaming else {}
        kind = self._format()
        if kind is None:
            try:
                return datasets.load_dataset(self.path, self.config, split=self.split or stage, **options), "hub"
            except Exception as error:
                raise SoftPromptError(
                    f"{self.path!r} could not be loaded as the {stage} split: neither a .jsonl, .csv or .parquet file "
                    f"nor a data set the hub gave ({type(error).__name__}: {error})"
                ) from error
        path = Path(self.path)
        if not path.is_file():
            raise SoftPromptError(f"{self.path} does not exist (the {stage} split); looked in {Path.cwd()}")
        if path.stat().st_size == 0:
            return [], kind
        if kind == "json" and not self.streaming:
            _check_lines(path)
        try:
            if self.streaming and kind == "csv":  # `datasets` would guess the columns' types anew in each chunk
                with path.open(encoding="utf-8-sig", newline="") as file:
                    columns = next(csv.reader(file))
                options["features"] = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
            return datasets.load_dataset(kind, data_files=str(path), split="train", **options), kind
        except Exception as error:
            raise SoftPromptError(f"{self.path} cannot be read as {kind}: {error.__cause__ or error}") from error


def read(data: Any, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set of `datasets`, with the names of class labels in place of their numbers.

    Raises:
        SoftPromptError: a row that cannot be read; `name` names the data set in the message.
    """
    classes = {
        column: feature
        for column, feature in (getattr(data, "features", None) or {}).items()
        if type(feature).__name__ == "ClassLabel"
    }
    rows = iter(data)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # readers and connections raise errors of many types
            raise SoftPromptError(f"{name} cannot be read: {error}") from error
        if row is None:
            return
        yield {**row, **{column: _class_name(feature, row[column]) for column, feature in classes.items()}}


def _class_name(feature: Any, number: int | None) -> str | None:
    """The name of class `number`; None if the row has no label, which data sets also write as -1."""
    return None if number is None or not 0 <= number < feature.num_classes else feature.int2str(number)


def _check_lines(path: Path) -> None:
    blank = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise SoftPromptError(f"{path}, line {blank}: expected one JSON object a line, found an empty line")
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SoftPromptError(
                    f"{path}, line {number}: expected one JSON object a line, found {error}"
                ) from error
            if not isinstance(row, dict):
                raise SoftPromptError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")

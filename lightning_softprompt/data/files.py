"""The rows of a file as they stand in it: JSON lines, CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import glob
import gzip
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from io import TextIOWrapper
from itertools import zip_longest
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.json_values import loads

# A row with its name in errors, or in its place the reason why it cannot be read.
Reading = Iterator[tuple[str, dict[str, Any] | SoftPromptError]]

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

_LONGEST = 2**26  # the most characters of a line, or of a quoted cell
_UNPACKED = 2**30  # a packed file of any size may unpack to so many characters,
_RATIO = 200  # and beyond that to so many times its size
_SHORT = {"float": "float32", "halffloat": "float16"}  # what Parquet calls floats of less than 64 bits, and others


def format_of(path: str | Path) -> str | None:
    """What the name of a file says about its format, one of `FORMATS`; None if it says nothing.

    Example:
        >>> format_of("rows.jsonl.gz"), format_of("imdb")
        ('.jsonl', None)
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in FORMATS and suffix != ".parquet" else None
    return suffix if suffix in FORMATS else None


def files_of(path: str, stage: str) -> list[Path]:
    """The file of that very name; if there is none, the files that the name matches as a pattern, in their order.

    Raises:
        SoftPromptError: no such file; `stage` is the split that it was to give.
    """
    found = _named(path)
    if not found:
        matches = ", and no file matches it as a pattern" if glob.has_magic(path) else ""
        raise SoftPromptError(f"{path} does not exist (the {stage} split){matches}; looked in {Path.cwd()}")
    return found


def is_among(file: Path, path: str) -> bool:
    """Whether a file is one of those that `files_of` finds under a name, by whichever path.

    Example:
        >>> is_among(Path(__file__), str(Path(__file__).parent / "*.py")), is_among(Path("gone.csv"), "*.csv")
        (True, False)
    """
    return file.exists() and any(file.samefile(each) for each in _named(path))


def _named(path: str) -> list[Path]:
    if Path(path).exists():
        return [Path(path)]
    return [Path(each) for each in sorted(glob.glob(path, recursive=True)) if Path(each).is_file()]


def read_file(path: Path) -> Reading:
    """The rows of a file. A row that cannot be read stops no other one: its reason comes in its place.

    Text stays as it stands in the file: nothing becomes a number, a date or a truth value, and an empty cell of a
    table is None. Numbers of JSON are as `json_values.loads` reads them. Blank lines are left out. The file is read
    anew each time, and no copy of it is kept.

    Raises:
        SoftPromptError: a file that cannot be read, of an unknown format or of another encoding than UTF-8; a JSON
            array; a table whose header has a name twice; a line of more than 67 million characters; or a packed or
            Parquet file that unpacks to more than a billion characters and 200 times its size.
    """
    kind = format_of(path)
    try:
        if kind is None:
            raise SoftPromptError(f"{path}: expected a file that ends in {', '.join(FORMATS)}, or in .gz behind these")
        if kind == ".parquet":
            yield from _parquet_rows(path)
        elif kind in (".csv", ".tsv"):
            yield from _table_rows(path, "," if kind == ".csv" else "\t")
        else:
            yield from _json_rows(path)
    except SoftPromptError:
        raise
    except Exception as error:  # what unpacks and reads files raises errors of many types
        raise SoftPromptError(f"{path} cannot be read ({' '.join(str(error).split())})") from error


def to_be_rendered(features: Mapping[str, Any] | None) -> dict[str, Any]:
    """The columns of a data set that hold numbers of classes, or floats of less than 64 bits, each with its feature."""
    return {
        name: each
        for name, each in (features or {}).items()
        if type(each).__name__ == "ClassLabel" or (type(each).__name__ == "Value" and each.dtype in _SHORT.values())
    }


def rendered(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the names of its classes in place of their numbers, and floats of 32 bits as they are written: 3.8.

    As a float of Python, that has 64 bits, it would be 3.799999952316284.
    """
    return {**row, **{name: _rendered(feature, row[name]) for name, feature in features.items()}}


def _rendered(feature: Any, value: Any) -> Any:
    if value is None or type(feature).__name__ == "ClassLabel":
        return _class_name(feature, value)
    return float(str(numpy.dtype(feature.dtype).type(value)))


def _class_name(feature: Any, number: int | None) -> str | None:
    """The name of class `number`; None if the row has no label, which data sets also write as -1."""
    return None if number is None or not 0 <= number < feature.num_classes else feature.int2str(number)


def _json_rows(path: Path) -> Reading:
    is_first = True
    for number, line in enumerate(_lines(path), 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        if is_first and line.lstrip().startswith("["):
            raise SoftPromptError(
                f"{where}: expected one JSON object a line, found a JSON array; write each of its objects into a line "
                "of its own, as jq -c '.[]' does"
            )
        is_first = False
        yield where, _json_row(where, line)


def _json_row(where: str, line: str) -> dict[str, Any] | SoftPromptError:
    other = _other_encoding(where, line)
    if other is not None:
        return other
    try:
        row = loads(line.strip())
    except RecursionError:
        return SoftPromptError(f"{where}: the JSON is nested too deep; make it flat")
    except ValueError as error:
        found = f"{error.msg} at character {error.pos + 1}" if isinstance(error, JSONDecodeError) else error
        return SoftPromptError(f"{where}: expected one JSON object a line ({found})")
    return row if isinstance(row, dict) else SoftPromptError(f"{where}: expected a JSON object, found {row!r:.100}")


def _table_rows(path: Path, delimiter: str) -> Reading:
    csv.field_size_limit(max(_LONGEST, csv.field_size_limit()))
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found = SoftPromptError(f"{where}: the quotes do not fit ({error}); write a quote inside quotes twice")
            if header is None:
                raise found from error
            yield where, found
            continue
        if not cells:
            continue  # blank lines stand in no table
        if header is None:
            header = _header(where, cells)
        else:
            yield where, _table_row(where, header, cells)


def _header(where: str, names: list[str]) -> list[str]:
    other = _other_encoding(where, "".join(names))
    if other is not None:
        raise other
    return _each_once(where, names)


def _each_once(where: str, names: list[str]) -> list[str]:
    twice = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if twice is not None:
        raise SoftPromptError(f"{where}: the header holds the name {twice!r} twice; name each column otherwise")
    return names


def _table_row(where: str, header: list[str], cells: list[str]) -> dict[str, Any] | SoftPromptError:
    other = _other_encoding(where, "".join(cells))
    if other is not None:
        return other
    if any(cells[len(header) :]):
        return SoftPromptError(
            f"{where}: expected {len(header)} cells, as in the header, found {len(cells)}; put a cell that holds the "
            "separator into quotes"
        )
    return {name: cell or None for name, cell in zip_longest(header, cells[: len(header)])}


def _parquet_rows(path: Path) -> Reading:
    from datasets import Features, Value
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        told = b"huggingface" in (file.schema_arrow.metadata or {})
        names = _each_once(str(path), file.schema_arrow.names)
        short = {each.name: Value(_SHORT[str(each.type)]) for each in file.schema_arrow if str(each.type) in _SHORT}
        features = to_be_rendered(Features.from_arrow_schema(file.schema_arrow) if told else short)
        number, count, most = 0, 0, _most_unpacked(path)
        for batch in file.iter_batches(batch_size=64):
            count += batch.nbytes
            if count > most:
                raise _unexpected(path, f"unpacks to over {most}")
            columns = [_values(column) for column in batch.columns]
            for values in zip(*columns, strict=True):
                number += 1
                row = dict(zip(names, values, strict=True))
                yield f"{path}, row {number}", rendered(row, features)


def _values(column: Any) -> list[Any]:
    """The values of a column of Parquet; None for one that Python cannot hold, such as a date of the year 300000."""
    try:
        values = column.to_pylist()
    except (ValueError, ArithmeticError):
        values = [_value(scalar) for scalar in column]
    return [_text_of(value) if isinstance(value, bytes) else value for value in values]


def _text_of(value: bytes) -> str | bytes:
    """The text of bytes, as some programs write it without saying so; the bytes where they are none."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, ArithmeticError):
        return None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file with what ends them. Bytes that are not UTF-8 are halves of surrogate pairs."""
    is_packed = path.suffix.lower() == ".gz"
    most = _most_unpacked(path) if is_packed else math.inf
    count = 0
    with gzip.open(path) if is_packed else path.open("rb") as file:
        start = file.peek(4)[:4]
        if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
            raise SoftPromptError(f"{path} is UTF-16 or UTF-32, expected UTF-8; save it as UTF-8")
        text = TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        for line in iter(partial(text.readline, _LONGEST), ""):
            count += len(line)
            if len(line) == _LONGEST or count > most:
                what = f"holds a line of {_LONGEST} characters or more" if count <= most else f"unpacks to over {most}"
                raise _unexpected(path, what)
            yield line


def _most_unpacked(path: Path) -> int:
    return max(_UNPACKED, _RATIO * path.stat().st_size)


def _unexpected(path: Path, what: str) -> SoftPromptError:
    return SoftPromptError(f"{path} {what}, which no data is expected to; if it is right, unpack or split it")


def _other_encoding(where: str, text: str) -> SoftPromptError | None:
    """The reason why a text is not what its file holds; None if it is."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return SoftPromptError(f"{where}: expected UTF-8, found the byte 0x{byte:02x}; save the file as UTF-8")
    return None

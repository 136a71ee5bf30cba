"""Values as they stand in files of every format, where a row stands, and files that cannot be read."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from lightning_softprompt import SoftPromptError
from lightning_softprompt.data import files
from lightning_softprompt.data.files import files_of, format_of, read_file
from lightning_softprompt.data.sources import read

VALUES = [
    "00501",
    "3.10",
    "1e5",
    "1E5",
    "true",
    "None",
    "NA",
    "null",
    "2024-05-01",
    "10:00:00Z",
    " x ",
    'say "so"',
    "a,b",
]
VALUES += ["a\nb", "a\r\nb", "\u00e9\u2028\x0b", "-", "'", "nan", "inf", "12345678901234567890123"]


def rows(path: Path) -> list[Any]:
    return [str(row) if isinstance(row, SoftPromptError) else row for _, row in read_file(path)]


def table(values: list[str], separator: str, newline: str) -> str:
    quoted = ['"' + value.replace('"', '""') + '"' if {*value} & {*'"\r\n', separator} else value for value in values]
    return newline.join([f"id{separator}value", *(f"r{separator}{value}" for value in quoted)]) + newline


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize(
    "name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.CSV", "rows.jsonl.gz", "a.csv.gz"]
)
def test_text_stands_as_it_is_written(tmp_path: Path, name: str, newline: str, start: str) -> None:
    path = tmp_path / name
    if "json" in name:
        content = newline.join(json.dumps({"id": "r", "value": value}, ensure_ascii=False) for value in VALUES)
    else:
        content = table(VALUES, "\t" if "tsv" in name else ",", newline)
    data = (start + content).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert rows(path) == [{"id": "r", "value": value} for value in VALUES]


def test_values_of_json_are_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 3.10, "yes": true, "none": null, "deep": {"a": [1e5]}}\n{"n": "of another type"}\n')
    first, second = rows(path)
    assert f"{first['n']} {first['deep']}" == "3.10 {'a': [1e5]}" and first["yes"] is True and first["none"] is None
    assert second == {"n": "of another type"}


def test_numbers_and_classes_of_parquet(tmp_path: Path) -> None:
    path, plain = tmp_path / "rows.parquet", tmp_path / "plain.parquet"
    classes = datasets.ClassLabel(names=["good", "bad"])
    features = datasets.Features({"text": datasets.Value("string"), "tone": classes, "stars": datasets.Value("int32")})
    given = {"text": ["00501", "b"], "tone": [1, -1], "stars": [5, None]}
    datasets.Dataset.from_dict(given, features=features).to_parquet(path)
    assert rows(path) == [{"text": "00501", "tone": "bad", "stars": 5}, {"text": "b", "tone": None, "stars": None}]
    when = datetime.datetime(2024, 5, 1)
    pandas.DataFrame({"price": [3.5], "when": [when], "kind": pandas.Categorical(["a"])}).to_parquet(plain)
    assert rows(plain) == [{"price": 3.5, "when": when, "kind": "a"}]
    assert [where for where, _ in read_file(path)] == [f"{path}, row 1", f"{path}, row 2"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("is_told", [True, False])
def test_short_floats_of_parquet_are_as_they_are_written(dtype: str, is_told: bool, tmp_path: Path) -> None:
    path, values = tmp_path / "rows.parquet", [0.1, 3.8, -1e-3, 5.0, None]
    short = [None if value is None else numpy.dtype(dtype).type(value) for value in values]
    table = pyarrow.table({"score": pyarrow.array(short, {"float32": "float", "float16": "halffloat"}[dtype])})
    datasets.Dataset(table).to_parquet(path) if is_told else pyarrow.parquet.write_table(table, path)
    assert [row["score"] for row in rows(path)] == values
    data = datasets.Dataset(table)
    assert [row["score"] for row in read(data, "some/set")] == values
    assert [row["score"] for row in read(data.to_iterable_dataset(), "some/set")] == values


def test_a_bad_value_in_a_column_of_parquet_stops_no_other_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    late = pyarrow.array([2**62, 0, None], pyarrow.timestamp("us"))
    texts = pyarrow.array([b"caf\xe9", b"ok", b""], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": ["a", "b", "c"], "late": late, "latin": texts, "deep": [[1], [], None]})
    pyarrow.parquet.write_table(table, path)
    first, second, third = rows(path)
    assert first == {"text": "a", "late": None, "latin": None, "deep": [1]}
    assert second == {"text": "b", "late": datetime.datetime(1970, 1, 1), "latin": "ok", "deep": []}
    assert third == {"text": "c", "late": None, "latin": "", "deep": None}
    pyarrow.parquet.write_table(pyarrow.table({}), path)
    assert rows(path) == []


def test_bytes_of_parquet_are_the_text_that_they_say(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = pyarrow.array(["café".encode(), None, b"\xff\xd8"], pyarrow.binary())  # as programs write texts, too
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "kind": texts.dictionary_encode()}), path)
    assert rows(path) == [{"text": value, "kind": value} for value in ("café", None, b"\xff\xd8")]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
def test_a_row_is_named_by_the_line_where_it_begins(tmp_path: Path, newline: str) -> None:
    path = tmp_path / "rows.csv"
    lines = ["a,b", "1,2", "", '"x', "", 'y",3', "4,5"]
    path.write_bytes(newline.join(lines).encode())
    found = list(read_file(path))
    assert [where for where, _ in found] == [f"{path}, line {number}" for number in (2, 4, 7)]
    assert found[1][1] == {"a": f"x{newline}{newline}y", "b": "3"}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(newline.join(['{"a": 1}', "", "  ", '{"a": 2}', ""]).encode())
    assert [where for where, _ in read_file(path)] == [f"{path}, line 1", f"{path}, line 4"]


def test_empty_cells_are_none_and_cells_too_many_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n,""\n1\n1,2,\n1,2,3\n"1" 2,3\n4,5\n')
    found = rows(path)
    assert found[:3] == [{"a": None, "b": None}, {"a": "1", "b": None}, {"a": "1", "b": "2"}]
    assert "line 5: expected 2 cells, as in the header, found 3; put" in found[3]
    assert "line 6: the quotes do not fit" in found[4] and found[5:] == [{"a": "4", "b": "5"}]
    path.write_text('a,b\n1,2\n"3,4\n')
    assert rows(path)[0] == {"a": "1", "b": "2"} and "line 3: the quotes do not fit" in rows(path)[1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "expected one JSON object a line (Expecting ',' delimiter at character 8)"),
        (b'{"a": 1, "a": 2}', "expected one JSON object a line (the key 'a' stands in it twice)"),
        (b"[1, 2]", "expected a JSON object, found [1, 2]"),
        (b'{"a": "caf\xe9"}', "expected UTF-8, found the byte 0xe9; save the file as UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "the JSON is nested too deep"),
    ],
    ids=["torn", "twice", "list", "latin", "deep"],
)
def test_a_bad_line_stops_no_other_one(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, second, third = rows(path)
    assert (first, third) == ({"a": 1}, {"a": 2}) and f"{path}, line 2: {reason}" in second


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (
            "rows.jsonl",
            b'\n[{"a": 1},\n{"a": 2}]',
            "line 2: expected one JSON object a line, found a JSON array; write",
        ),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16 or UTF-32, expected UTF-8"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16-le"), "is UTF-16 or UTF-32, expected UTF-8"),
        ("rows.csv", b"a,caf\xe9\n1,2\n", "line 1: expected UTF-8, found the byte 0xe9"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "line 1: the header holds the name 'a' twice"),
        ("rows.csv", b'a,"b\n1,2,3\n', "line 1: the quotes do not fit"),
        ("rows.csv.gz", b"a,b\n1,2\n", "cannot be read (Not a gzipped file"),
        ("rows.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99)[:-20], "cannot be read ("),
        ("rows.parquet", b"PAR1 and no more of it", "cannot be read ("),
        ("rows.txt", b"a", "expected a file that ends in .jsonl, .json, .csv, .tsv, .parquet, or in .gz"),
    ],
    ids=lambda value: value[:16] if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SoftPromptError) as caught:
        rows(path)
    assert reason in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_and_a_latin_cell(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(SoftPromptError, match=r"folder\.csv cannot be read"):
        rows(tmp_path / "folder.csv")
    (tmp_path / "rows.csv").write_bytes(b"a,b\n1,caf\xe9\n2,ok\n")
    first, second = rows(tmp_path / "rows.csv")
    assert "line 2: expected UTF-8, found the byte 0xe9" in first and second == {"a": "2", "b": "ok"}


def test_a_bomb_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_UNPACKED", 50_000)
    monkeypatch.setattr(files, "_LONGEST", 30_000)
    path = tmp_path / "rows.jsonl.gz"
    row = b'{"a": "' + b"x" * 900 + b'"}\n'
    path.write_bytes(gzip.compress(row * 40))
    assert len(rows(path)) == 40
    packed = gzip.compress(row * 10_000)
    assert 200 * len(packed) < len(row) * 10_000
    path.write_bytes(packed)
    with pytest.raises(SoftPromptError, match=r"unpacks to over \d+, which no data is expected to"):
        rows(path)
    for name in ("long.jsonl.gz", "long.jsonl", "long.csv"):
        data = b'"' + b"x" * 40_000
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        with pytest.raises(SoftPromptError, match="holds a line of 30000 characters or more"):
            rows(tmp_path / name)


def test_a_long_cell_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a\n" + "x" * 300_000 + "\n")
    assert rows(tmp_path / "rows.csv") == [{"a": "x" * 300_000}]


def test_a_path_is_that_file_and_else_a_pattern(tmp_path: Path) -> None:
    for name in ("fold1.csv", "fold2.csv", "fold[12].csv", "all*.csv", "all-old.csv"):
        (tmp_path / name).write_text("a\n1\n")
    (tmp_path / "fold3.csv").mkdir()

    def named(pattern: str) -> list[str]:
        return [path.name for path in files_of(str(tmp_path / pattern), "train")]

    assert named("fold[12].csv") == ["fold[12].csv"] and named("all*.csv") == ["all*.csv"]
    assert named("fold?.csv") == ["fold1.csv", "fold2.csv"] and named("fold*.csv") == [
        "fold1.csv",
        "fold2.csv",
        "fold[12].csv",
    ]
    with pytest.raises(
        SoftPromptError, match=r"does not exist \(the train split\), and no file matches it as a pattern"
    ):
        named("none*.csv")
    with pytest.raises(SoftPromptError, match=r"none\.csv does not exist \(the train split\); looked in"):
        named("none.csv")


def test_a_name_says_the_format() -> None:
    names = {
        "a.jsonl": ".jsonl",
        "b.JSON": ".json",
        "c.csv.gz": ".csv",
        "d.parquet.gz": None,
        "imdb": None,
        "e.gz": None,
    }
    assert {name: format_of(name) for name in names} == names


@pytest.mark.parametrize("blank", ["\n", "\r\n\n"])
def test_blank_lines_in_front_of_a_header_are_left_out(tmp_path: Path, blank: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{blank}a,b\n\n1,2\n")
    assert rows(path) == [{"a": "1", "b": "2"}]


def test_a_header_of_many_names_is_read_at_once(tmp_path: Path) -> None:
    names, path = [f"c{number}" for number in range(40_000)], tmp_path / "rows.csv"
    path.write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n")
    assert rows(path) == [dict.fromkeys(names, "1")]


def test_a_name_of_parquet_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"]), path)
    with pytest.raises(SoftPromptError, match=r"rows.parquet: the header holds the name 'a' twice"):
        rows(path)


def test_parquet_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 2**16] * 400}), path)
    assert len(rows(path)) == 400 and path.stat().st_size < 2**16
    monkeypatch.setattr(files, "_UNPACKED", 2**24)
    with pytest.raises(SoftPromptError, match="unpacks to over 16777216, which no data is expected to"):
        rows(path)

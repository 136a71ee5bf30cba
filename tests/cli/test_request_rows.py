"""Rows of an input file: those that are requests, and why the others are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_softprompt import SoftPromptError
from lightning_softprompt.cli.request_rows import read_request_rows

TASKS = ("tone", "kind")


def read(path: Path, content: str | bytes) -> list:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_request_rows(str(path), TASKS, ("output", "error"))


def test_values_stand_as_they_are_written(tmp_path: Path) -> None:
    line = (
        '{"task": "tone", "text": "00501", "n": 3.10, "yes": true, "none": null, "deep": {"a": [1]}, "output": "old"}'
    )
    (row,) = read(tmp_path / "rows.jsonl", "\ufeff" + line + "\r\n\n")
    assert str(row.columns["n"]) == "3.10"
    assert row.columns == {"task": "tone", "text": "00501", "n": 3.1, "yes": True, "none": None, "deep": {"a": [1]}}
    assert row.where.endswith("rows.jsonl, line 1") and not row.error


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"task": "tone", "text": "a", "text": "b"}', "the key 'text' stands in it twice"),
        ('{"task": "tone", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"task": "tone"', "expected one JSON object a line"),
        (b'{"task": "tone", "text": "\xff"}', "expected UTF-8, found the byte 0xff; save the file as UTF-8"),
        ("[1, 2]", r"expected a JSON object, found \[1, 2\]"),
        ('{"text": "a"}', "there is no task; give it a 'task', one of 'tone', 'kind', or null for no prompt"),
        ('{"task": "mood"}', "unknown task 'mood'; known tasks: 'tone', 'kind'"),
        ('{"task": ["tone"]}', r"unknown task \['tone'\]"),
        ('{"task": 1}', "unknown task 1"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "bytes",
)
def test_a_line_that_is_no_request_stops_no_other_one(tmp_path: Path, line: str | bytes, reason: str) -> None:
    good = b'{"task": "kind"}'
    line = line if isinstance(line, bytes) else line.encode()
    rows = read(tmp_path / "rows.jsonl", b"\n".join([good, b"", line, b'{"task": null}']))
    assert [bool(row.error) for row in rows] == [False, True, False]
    assert rows[2].columns == {"task": None}
    with pytest.raises(SoftPromptError, match=rf"rows\.jsonl, line 3: .*{reason}"):
        raise SoftPromptError(rows[1].error)


def test_a_number_names_the_task_that_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"task": 1}\n{"task": true}\n{"task": 2}\n')
    rows = read_request_rows(str(tmp_path / "rows.jsonl"), ("1", "true"), ())
    assert [row.task for row in rows[:2]] == ["1", "true"] and rows[0].columns == {"task": 1}
    assert [row.error.partition(": ")[2] for row in rows] == ["", "", "unknown task 2; known tasks: '1', 'true'"]


def test_other_files_are_read_as_sources(tmp_path: Path) -> None:
    rows = read(tmp_path / "rows.csv", "task,text\ntone,good\nmood,bad\n")
    assert rows[0].columns == {"task": "tone", "text": "good"} and "line 3: unknown task 'mood'" in rows[1].error


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match="does not exist"):
        read_request_rows(str(tmp_path / "none.jsonl"), TASKS, ())
    with pytest.raises(SoftPromptError, match="is empty"):
        read(tmp_path / "rows.jsonl", "\n")


def test_another_column_may_name_the_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "tone", "task": 7}\n{"kind": null}\n{"task": "tone"}\n')
    rows = read_request_rows(str(path), TASKS, (), "kind")
    assert [row.task for row in rows] == ["tone", None, None] and rows[0].columns == {"kind": "tone", "task": 7}
    expected = "there is no task; give it a 'kind', one of 'tone', 'kind', or null for no prompt"
    assert [row.error.partition(": ")[2] for row in rows] == ["", "", expected]
    (row,) = read_request_rows(str(path), ("one",), (), "knd")[:1]
    assert "give it a 'knd'" in row.error  # a column that is asked for by name has to be there
    rows = read_request_rows(str(path), TASKS, ())
    assert rows[1].error.endswith("or null for no prompt; where another column names it, give --task_column")

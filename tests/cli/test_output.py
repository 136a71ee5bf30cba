"""What commands print and write."""

from __future__ import annotations

import datetime
import json
import math

from lightning_softprompt.cli.output import RowWriter, say, write_rows


def test_what_is_no_number_is_null(capsys) -> None:
    say({"metrics": {"loss": math.nan, "all": [1.0, -math.inf]}}, True)
    assert json.loads(capsys.readouterr().out) == {"metrics": {"loss": None, "all": [1.0, None]}}


def test_rows_are_written_into_a_new_folder_whatever_they_hold(tmp_path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, [{"when": datetime.datetime(2024, 5, 1), "text": "\u00e9"}, {"n": 1}])
    assert path.read_text(encoding="utf-8") == '{"when": "2024-05-01 00:00:00", "text": "\u00e9"}\n{"n": 1}\n'


def test_rows_are_written_as_they_come_and_a_torn_line_is_cut_off(tmp_path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    writer = RowWriter(path, resume=True)  # nothing to go on with is no reason to fail
    writer.write([{"n": 1, "text": "é"}])
    assert path.read_text(encoding="utf-8") == '{"n": 1, "text": "é"}\n'  # before it is closed
    writer.write([{"bad": float("nan"), "half": "\ud800"}])
    writer.close()
    with path.open("a") as file:
        file.write('{"n": 3')
    writer = RowWriter(path, resume=True)
    writer.write([{"n": 3}])
    writer.close()
    assert writer.written == [{"n": 1, "text": "é"}, {"bad": None, "half": "\ud800"}]
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [*writer.written, {"n": 3}]
    RowWriter(path, resume=False).close()
    assert path.read_bytes() == b""

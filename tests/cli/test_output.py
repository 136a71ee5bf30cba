"""What commands print and write."""

from __future__ import annotations

import datetime
import json
import math

from lightning_softprompt.cli.output import say, write_rows


def test_what_is_no_number_is_null(capsys) -> None:
    say({"metrics": {"loss": math.nan, "all": [1.0, -math.inf]}}, True)
    assert json.loads(capsys.readouterr().out) == {"metrics": {"loss": None, "all": [1.0, None]}}


def test_rows_are_written_into_a_new_folder_whatever_they_hold(tmp_path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, [{"when": datetime.datetime(2024, 5, 1), "text": "\u00e9"}, {"n": 1}])
    assert path.read_text(encoding="utf-8") == '{"when": "2024-05-01 00:00:00", "text": "\u00e9"}\n{"n": 1}\n'

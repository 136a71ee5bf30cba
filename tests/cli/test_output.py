"""What commands print and write."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from pathlib import Path

import pytest

from lightning_softprompt.cli.output import RowWriter, print_table, progress_bar, say, write_rows
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.characters import has_control


def test_what_is_no_number_is_null(capsys) -> None:
    say({"metrics": {"loss": math.nan, "all": [1.0, -math.inf]}}, True)
    assert json.loads(capsys.readouterr().out) == {"metrics": {"loss": None, "all": [1.0, None]}}


def test_nothing_that_is_printed_holds_control_characters(capsys, monkeypatch) -> None:
    attack = "a\x1b[31m\x9b2Jb\ud800"
    say({"task": attack, "pair": (1.0, math.nan)}, True)
    out = capsys.readouterr().out
    assert json.loads(out) == {"task": attack, "pair": [1.0, None]}
    assert not has_control(out.rstrip("\n"))
    say({}, False, f"{attack}\nnext")
    print_table(attack, [{attack: attack, "markup": "[red]x[/] :smile:"}])
    out = capsys.readouterr().out
    assert not has_control(out, allowed="\n") and r"\x1b[31m" in out and "[red]x[/] :smile:" in out


def test_progress_tells_a_rate(capsys) -> None:
    with progress_bar("answering", 10, 4, "rows") as advance:
        advance(6)
    assert re.search(r"answering .* 10/10 [\d.e+]+ rows/s", capsys.readouterr().err)


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


def test_an_earlier_file_stays_until_there_are_rows_to_replace_it(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    writer = RowWriter(path, resume=False)
    assert writer.written == [] and len(path.read_text().splitlines()) == 2
    for number in (3, 4):
        writer.write([{"n": number}])
    writer.close()
    assert path.read_text() == '{"n": 3}\n{"n": 4}\n'


def test_rows_go_to_pipes_and_devices(tmp_path) -> None:
    reading, writing = os.pipe()
    for path in (f"/dev/fd/{writing}", "/dev/null"):
        writer = RowWriter(Path(path), resume=False)
        writer.write([{"n": 1}])
        writer.close()
    os.close(writing)
    with open(reading) as pipe:
        assert pipe.read() == '{"n": 1}\n'


@pytest.mark.parametrize("content", ["[1]\n", "null\n", '{"n": 1}\n"x"\n', "no JSON\n", '{"n": 1, "n": 2}\n'])
def test_what_holds_something_else_than_rows_is_not_gone_on_with(content: str, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(SoftPromptError, match=r"holds something else than rows .*; give another output"):
        RowWriter(tmp_path / "rows.jsonl", resume=True)
    assert (tmp_path / "rows.jsonl").read_text() == content

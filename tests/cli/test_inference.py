"""The command that answers the rows of a file."""

from __future__ import annotations

import json
import shutil

import pytest

from lightning_softprompt import MixedTaskGenerator, SoftPrompts, cli
from tests import tiny
from tests.cli.command_line import refused, said, word_tokenizer_of


def test_requests_that_no_row_of_can_be_read_end_before_a_model_is_loaded(tiny_base, tmp_path, capsys) -> None:
    SoftPrompts.for_model(tiny.tiny_model(), {"tone": 2}).save_pretrained(tmp_path / "prompts")
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    places = [f"--input={requests}", f"--output={answers}", f"--prompts={tmp_path / 'prompts'}"]
    for row, template, expected in (
        (
            '{"task": "tone", "text": "it"}',
            "{txt}",
            "line 1: the template '{txt}' needs the column 'txt', which is miss",
        ),
        ('{"text": "it"}', "{text}", "line 1: there is no task; known tasks: 'tone'"),
    ):
        requests.write_text(row + "\n")
        with pytest.raises(SystemExit) as exit_:
            cli.main(["generate", "--base=nowhere", *places, f"--template={template}"])
        assert exit_.value.code == 1 and not answers.exists()
        assert expected in capsys.readouterr().err


def test_a_chat_is_answered_as_it_was_trained(tiny_base, tmp_path, capsys) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = word_tokenizer_of(base)
    tokenizer.chat_template = "{% for turn in messages %}so {{ turn.content }} {% endfor %}=>"
    tokenizer.save_pretrained(base)
    SoftPrompts.for_model(tiny.tiny_model(), {"tone": 4}).save_pretrained(tmp_path / "prompts")
    (tmp_path / "rows.jsonl").write_text('{"task": "tone", "text": "it is good"}\n')
    files = [f"--input={tmp_path / 'rows.jsonl'}", f"--output={tmp_path / 'out' / 'answers.jsonl'}"]
    arguments = ["generate", f"--base={base}", f"--prompts={tmp_path / 'prompts'}", *files, "--max_new_tokens=6"]
    said(capsys, *arguments, "--chat=true", "--system=a")
    answer = json.loads((tmp_path / "out" / "answers.jsonl").read_text())["output"]
    generator = MixedTaskGenerator.from_pretrained(base, tmp_path / "prompts")
    assert [answer] == generator.generate(["so a so it is good =>"], ["tone"], max_new_tokens=6)
    assert [answer] != generator.generate(["it is good"], ["tone"], max_new_tokens=6)


def test_a_tokenizer_that_knows_more_than_the_model(tiny_base, tmp_path, capsys) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = word_tokenizer_of(base)
    tokenizer.add_tokens([f"more{number}" for number in range(len(tokenizer), tiny.VOCABULARY)])
    tokenizer.save_pretrained(base)
    SoftPrompts.for_model(tiny.tiny_model(), {"tone": 4}).save_pretrained(tmp_path / "prompts")
    generator = MixedTaskGenerator.from_pretrained(base, tmp_path / "prompts")
    expected = generator.generate(["it is good", "so"], ["tone", "tone"])
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    tokenizer.save_pretrained(base)
    rows = [{"task": "tone", "text": text} for text in ("it is good", "so", "it is <beyond>")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--input={tmp_path / 'rows.jsonl'}", f"--output={tmp_path / 'answers.jsonl'}"]
    line = refused(capsys, "generate", f"--base={base}", f"--prompts={tmp_path / 'prompts'}", *files)
    assert "1 of 3 rows have no answer" in line and "line 3: the text has token 61, the model's embedding knows" in line
    answers = [json.loads(row).get("output") for row in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers == [*expected, None]

"""The command that answers the rows of a file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lightning_softprompt import MixedTaskGenerator, SoftPrompts, TaskTemplate, cli
from tests import tiny
from tests.cli.command_line import refused, said, word_tokenizer_of


def test_requests_that_no_row_of_can_be_read_end_before_a_model_is_loaded(tiny_base, tmp_path, capsys) -> None:
    SoftPrompts.for_model(tiny.tiny_model(), {"tone": 2, "kind": 3}).save_pretrained(tmp_path / "prompts")
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    places = [f"--input={requests}", f"--output={answers}", f"--prompts={tmp_path / 'prompts'}"]
    for row, template, expected in (
        (
            '{"task": "tone", "text": "it"}',
            "{txt}",
            "line 1: the template '{txt}' needs the column 'txt', which is miss",
        ),
        ('{"text": "it"}', "{text}", "line 1: there is no task; give it a 'task', one of 'tone', 'kind', or null"),
        ('{"review": "it"}', "{text}", "line 1: there is no task; give it a 'task', one of 'tone', 'kind', or null"),
    ):
        requests.write_text(row + "\n")
        with pytest.raises(SystemExit) as exit_:
            cli.main(["generate", "--base=nowhere", *places, f"--template={template}"])
        assert exit_.value.code == 1 and not answers.exists()
        assert expected in capsys.readouterr().err


def test_rows_need_not_name_the_only_task(tiny_base, tmp_path, capsys) -> None:
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"tone": 4})
    prompts.templates["tone"] = TaskTemplate("{text} .", " {label}", [" good", " bad"])
    prompts.save_pretrained(tmp_path / "prompts")
    rows = [{"text": "it is"}, {"text": "so"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"--base={tiny_base}", f"--prompts={tmp_path / 'prompts'}", f"--input={tmp_path / 'rows.jsonl'}"]
    said(capsys, "classify", *common, f"--output={tmp_path / 'labels.jsonl'}")
    found = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    generator = MixedTaskGenerator.from_pretrained(tiny_base, tmp_path / "prompts")
    expected = generator.classify(["it is", "so"], ["tone", "tone"])
    assert [row["label"] for row in found] == [each.label.strip() for each in expected]
    assert [row["task"] for row in found] == ["tone", "tone"] and found[0]["probabilities"] != found[1]["probabilities"]
    before = (tmp_path / "labels.jsonl").read_bytes()
    said(capsys, "classify", *common, f"--output={tmp_path / 'labels.jsonl'}", "--resume")
    assert (tmp_path / "labels.jsonl").read_bytes() == before


def test_the_file_that_trained_with_a_column_of_its_own_is_answered(tiny_base, tmp_path, capsys) -> None:
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"tone": 4, "mood": 2})
    for task in prompts:
        prompts.templates[task] = TaskTemplate("{text} .", " {label}", [" good", " bad"])
    prompts.save_pretrained(tmp_path / "prompts")
    rows = [{"kind": kind, "text": "it is"} for kind in ("tone", "mood")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"--base={tiny_base}", f"--prompts={tmp_path / 'prompts'}", f"--input={tmp_path / 'rows.jsonl'}"]
    for command, added in (("classify", "label"), ("generate", "output")):
        output = tmp_path / f"{command}.jsonl"
        said(capsys, command, *common, "--task_column=kind", f"--output={output}")
        found = lines(output)
        assert [list(row) for row in found] == [["kind", "text", added, "probabilities"]] * 2
        assert [row["kind"] for row in found] == ["tone", "mood"] and not any("error" in row for row in found)


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


@pytest.fixture
def asked(tiny_base, tmp_path) -> list[str]:
    """Arguments that answer nine rows of "it is good", so many at once as fit 20 tokens."""
    SoftPrompts.for_model(tiny.tiny_model(), {"tone": 4}).save_pretrained(tmp_path / "prompts")
    rows = [{"task": "tone", "text": "it is good", "id": number} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--input={tmp_path / 'rows.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    return ["generate", f"--base={tiny_base}", f"--prompts={tmp_path / 'prompts'}", *files, "--max_batch_tokens=20"]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_written_as_they_come_and_gone_on_with(asked, tmp_path, capsys, monkeypatch) -> None:
    said(capsys, *asked, "--max_new_tokens=2")
    expected, output = lines(tmp_path / "out.jsonl"), tmp_path / "out.jsonl"
    calls = []
    answer = MixedTaskGenerator.answer

    def until_the_third(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, *args, **kwargs)

    monkeypatch.setattr(MixedTaskGenerator, "answer", until_the_third)
    with pytest.raises(SystemExit):
        cli.main([*asked, "--max_new_tokens=2"])
    kept = lines(output)
    assert kept == expected[: len(kept)] and 0 < len(kept) < 9
    with output.open("a") as file:
        file.write('{"task": "tone", "te')  # as a process leaves it that is killed while it writes
    said(capsys, *asked, "--max_new_tokens=2", "--resume=true")
    assert lines(output) == expected and sum(len(texts) for texts, *_ in calls) >= 9
    done = len(calls)
    said(capsys, *asked, "--max_new_tokens=2", "--resume=true")
    assert lines(output) == expected and len(calls) == done


def test_rows_are_answered_and_classified_by_their_tasks_templates(asked, tiny_base, tmp_path, capsys) -> None:
    prompts = SoftPrompts.from_pretrained(tmp_path / "prompts")
    prompts.add("words", torch.randn(3, prompts.hidden_size))
    prompts.templates["tone"] = TaskTemplate("{text} =>", " {label}", [" good", " bad"])
    prompts.save_pretrained(tmp_path / "prompts")
    rows = [
        {"task": "tone", "text": "it is"}, {"task": "words", "text": "so"}, {"task": None, "text": "a"},
        {"task": "tone", "txt": "it is"},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(capsys, *asked, "--max_new_tokens=2")
    found = lines(tmp_path / "out.jsonl")
    generator = MixedTaskGenerator.from_pretrained(tiny_base, tmp_path / "prompts")
    expected = generator.answer(["it is", "so", "a"], ["tone", "words", None], max_new_tokens=2)
    assert [row.get("output") for row in found] == [*expected, None] and "needs the column 'text'" in found[3]["error"]
    assert "line 2: the task 'words' has no labels" in refused(capsys, "classify", *asked[1:])
    found = lines(tmp_path / "out.jsonl")
    (answer,) = generator.classify(["it is"], ["tone"])
    assert found[0] == rows[0] | {
        "label": answer.label.strip(),
        "probabilities": {label.strip(): pytest.approx(each, rel=1e-5) for label, each in answer.probabilities.items()},
    }
    assert [list(row)[-1] for row in found] == ["probabilities", "error", "error", "error"]


def test_an_output_of_other_rows_is_not_gone_on_with(asked, tmp_path, capsys) -> None:
    (tmp_path / "out.jsonl").write_text('{"task": "tone", "text": "another", "id": 0, "output": "x"}\n')
    assert "line 1 of" in refused(capsys, *asked, "--resume=true")
    assert lines(tmp_path / "out.jsonl")[0]["text"] == "another"
    (tmp_path / "out.jsonl").write_text("no JSON\n")
    assert "holds something else than rows" in refused(capsys, *asked, "--resume=true")


def test_an_output_that_cannot_be_written_is_found_before_the_work(asked, tmp_path, capsys) -> None:
    asked = [each if "--output" not in each else f"--output={tmp_path / 'rows.jsonl' / 'out.jsonl'}" for each in asked]
    asked = [each if "--base" not in each else "--base=nowhere" for each in asked]
    assert "rows.jsonl" in refused(capsys, *asked)


@pytest.mark.parametrize("command", ["generate", "classify"])
def test_what_is_read_is_never_written_over(command: str, asked, tmp_path, capsys) -> None:
    before, linked = (tmp_path / "rows.jsonl").read_text(), tmp_path / "linked.jsonl"
    linked.symlink_to(tmp_path / "rows.jsonl")
    for output in (tmp_path / "rows.jsonl", linked):
        for more in ([], ["--resume"], [f"--input={tmp_path / '*.jsonl'}"]):
            line = refused(capsys, command, *asked[1:], f"--output={output}", *more)
            assert f"{output} is one of the files that are read" in line and "give another output" in line
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_earlier_answers_stay_where_no_new_ones_come(asked, tmp_path, capsys) -> None:
    (tmp_path / "out.jsonl").write_text("earlier answers\n")
    assert "no causal LM could be loaded" in refused(capsys, *asked, "--base=nowhere")
    assert (tmp_path / "out.jsonl").read_text() == "earlier answers\n"
    said(capsys, *asked, "--max_new_tokens=2")
    assert len(lines(tmp_path / "out.jsonl")) == 9


def test_a_bad_row_stops_no_other_one(asked, tmp_path, capsys) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "it is good"}\n{"task": "tone", "text": "it", "note": "\\ud800"}\n')
    line = refused(capsys, *asked, "--max_new_tokens=2")
    assert "1 of 11 rows have no answer" in line and "line 10: there is no task" in line
    rows = lines(tmp_path / "out.jsonl")
    assert [index for index, row in enumerate(rows) if "error" in row] == [9]
    assert all("output" in row for index, row in enumerate(rows) if index != 9) and rows[10]["note"] == "\ud800"


def test_columns_of_the_user_are_written_as_they_were_read(asked, tmp_path, capsys) -> None:
    rows = [
        '{"task": "tone", "text": "it is good", "n": 3.10, "e": 1e5, "id": "00501", "when": "2024-05-01", "yes": true',
        '{"task": "tone", "text": "so <eos> so", "none": null, "deep": {"a": [1.0, "é"]}, "n": NaN',
    ]
    (tmp_path / "rows.jsonl").write_text("".join(row + "}\n" for row in rows), encoding="utf-8")
    said(capsys, *asked, "--max_new_tokens=2")
    written = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith(row.replace("NaN", "null")) for line, row in zip(written, rows, strict=True))
    said(capsys, *asked, "--max_new_tokens=2", "--resume=true")
    (tmp_path / "rows.csv").write_text('task,my text,id\ntone,"so, it is",00501\ntone,good,\n')
    table = [f"--input={tmp_path / 'rows.csv'}" if "--input" in each else each for each in asked]
    said(capsys, *table, "--max_new_tokens=2", "--template={my text} =>")
    written = [{**row, "output": None} for row in lines(tmp_path / "out.jsonl")]
    assert written[0] == {"task": "tone", "my text": "so, it is", "id": "00501", "output": None}
    assert written[1] == {"task": "tone", "my text": "good", "id": None, "output": None}


@pytest.mark.parametrize("column", ["error", "output", "probabilities", "label"])
def test_a_template_may_name_a_column_that_the_command_writes(column: str, asked, tiny_base, tmp_path, capsys) -> None:
    prompts = SoftPrompts.from_pretrained(tmp_path / "prompts")
    prompts.templates["tone"] = TaskTemplate(f"{{{column}}} =>", " {kind}", [" good", " bad"])
    prompts.save_pretrained(tmp_path / "prompts")
    rows = [{column: text, "id": number} for number, text in enumerate(("it is", "so a film"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = MixedTaskGenerator.from_pretrained(tiny_base, tmp_path / "prompts")
    expected = [answer.label.strip() for answer in generator.classify(rows, ["tone", "tone"])]
    for command, name in (("generate", "output"), ("classify", "label")):
        for more in ([], ["--resume"]):
            assert said(capsys, command, *asked[1:4], f"--output={tmp_path / command}", *more)["failed"] == 0
        found = lines(tmp_path / command)
        assert [row[name] for row in found] == expected and [row["id"] for row in found] == [0, 1]
        assert not any("error" in row for row in found)
    texts = ["it is", "so a film"]
    said(capsys, *asked, f"--template={{{column}}}", "--max_new_tokens=3")
    outputs = generator.generate(texts, ["tone", "tone"], max_new_tokens=3)
    assert [row["output"] for row in lines(tmp_path / "out.jsonl")] == outputs


def test_special_tokens_of_a_row_end_no_text(asked, tiny_base, tmp_path, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"task": "tone", "text": "it <eos> good"}\n{"task": "tone", "text": "\\ud800"}\n'
    )
    assert "1 of 2 rows have no answer" in refused(capsys, *asked, "--max_new_tokens=4", "--template={text} =>")
    first, second = lines(tmp_path / "out.jsonl")
    assert "line 2: the tokenizer cannot read" in second["error"]
    generator = MixedTaskGenerator.from_pretrained(tiny_base, tmp_path / "prompts")
    ids = generator.tokenizer("it <eos> good =>", split_special_tokens=True)["input_ids"]
    assert [first["output"]] == generator.generate([ids], ["tone"], max_new_tokens=4)


@pytest.mark.parametrize("template", ["{", "{text!r}", "{text:>9}", "{}"])
def test_a_template_is_checked_before_anything_is_done(asked, tmp_path, capsys, template: str) -> None:
    (tmp_path / "out.jsonl").write_text("what was there\n")
    line = refused(capsys, "generate", "--base=nowhere", *asked[2:], f"--template={template}")
    assert "task '--template': the template" in line and "braces" in line
    assert (tmp_path / "out.jsonl").read_text() == "what was there\n"


def test_a_row_that_is_nested_deep_stops_no_other_one(asked, tmp_path, capsys) -> None:
    deep = [f'{{"task": "tone", "text": {"[" * depth}{"]" * depth}}}' for depth in (90, 400, 900)]
    (tmp_path / "rows.jsonl").write_text("\n".join(['{"task": "tone", "text": "it"}', *deep]))
    line = refused(capsys, *asked, "--max_new_tokens=2", "--template={text} =>")
    assert "2 of 4 rows have no answer" in line and "line 3: the JSON is nested too deep" in line
    assert [sorted(row) for row in lines(tmp_path / "out.jsonl")][2:] == [["error"]] * 2

"""`init` writes a config that runs as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_softprompt import SoftPrompts, cli
from tests.cli.command_line import refused, said


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed() -> list[dict[str, Any]]:
    labels = {"no": ["good", "bad"], "tone": ["mild", "strong"]}
    rows = []
    for number in range(40):
        task = ["no", "tone"][number % 2]
        rows.append({"task": task, "text": f"a film {number}", "label": labels[task][number // 2 % 2]})
    return rows


def fit(config: Path, folder: Path, capsys) -> dict[str, Any]:
    quiet = [f"--trainer.default_root_dir={folder}", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    return said(capsys, "fit", "--config", config, "--trainer.max_epochs=1", "--trainer.accelerator=cpu", *quiet)


def test_the_config_runs_unchanged(tiny_base, tmp_path, capsys) -> None:
    data, config = write(tmp_path / "reviews.jsonl", mixed()), tmp_path / "new" / "run.yaml"
    found = said(capsys, "init", "--data", data, "--base", tiny_base, "--output", config)
    assert [(each["task"], each["labels"]) for each in found["tasks"]] == [
        ("no", [" bad", " good"]),
        ("tone", [" mild", " strong"]),
    ]
    assert (found["train"], found["held_out"]) == (36, 4)
    text = config.read_text()
    assert "#   label: good\n" in text and '"no": "Which label fits the text: bad or good?"' in text
    assert "  max_epochs: 100             # of 3 steps: 300 in all\n" in text and '    # predict: "new.jsonl" ' in text
    done = fit(config, tmp_path, capsys)
    assert done["tasks"] == ["no", "tone"] and done["steps"] == 3
    assert SoftPrompts.from_pretrained(done["prompts"]).templates["no"].text == "{text}\nLabel:"
    assert {row["task"] for row in done["results"]} == {"no", "tone"}


def test_what_the_config_has_as_comments_runs(tiny_base, tmp_path, capsys) -> None:
    data, config = write(tmp_path / "reviews.jsonl", mixed()), tmp_path / "run.yaml"
    said(capsys, "init", "--data", data, "--base", tiny_base, "--output", config)
    text, chat = config.read_text(), "        # chat: true"
    key = r"^( +)# (?=(?:- )?[a-z_]+: )"
    assert len(re.findall(key, text, re.MULTILINE)) == 7 and text.count(chat) == 2  # the tiny base has no chats
    config.write_text(re.sub(key, r"\1", text.replace(chat, "#"), flags=re.MULTILINE))
    assert fit(config, tmp_path, capsys)["steps"] == 3


def test_few_rows_to_judge_by_are_told(tiny_base, tmp_path, capsys) -> None:
    data, config = write(tmp_path / "reviews.jsonl", mixed()), tmp_path / "run.yaml"
    cli.main(["init", "--data", str(data), "--base", str(tiny_base), "--output", str(config)])
    told = "36 rows train; only 4 rows are held out, too few to judge by: give --validation if you have more\n"
    assert told in capsys.readouterr().out


def test_of_many_labels_the_start_names_the_first(tiny_base, tmp_path, capsys) -> None:
    rows = [{"text": f"film {number}", "label": f"l{number % 12:02}"} for number in range(48)]
    data, config = write(tmp_path / "many.jsonl", rows), tmp_path / "run.yaml"
    said(capsys, "init", "--data", data, "--base", tiny_base, "--output", config)
    (start,) = yaml.safe_load(config.read_text())["prompts"]["tasks"].values()
    assert start == f"Which label fits the text: {', '.join(f'l{number:02}' for number in range(10))} or another?"


def test_a_row_that_cannot_be_used_is_left_out_only_where_there_was_one(tiny_base, tmp_path, capsys) -> None:
    held, rows = write(tmp_path / "held.jsonl", mixed()), [*mixed(), {"task": "no", "text": "", "label": "good"}]
    data, config = write(tmp_path / "whole.jsonl", mixed()), tmp_path / "run.yaml"
    places = ["--base", tiny_base, "--output", config, "--validation", held, "--force"]
    assert said(capsys, "init", "--data", data, *places)["left_out"] == 0 and "strict" not in config.read_text()
    write(data, rows)
    assert said(capsys, "init", "--data", data, *places)["left_out"] == 1
    assert "    strict: false             # leaves out rows with an empty column: 1\n" in config.read_text()
    assert fit(config, tmp_path, capsys)["steps"] == 3
    said(capsys, "init", "--data", data, *places[:4], "--force")  # files of their own hold none
    assert "strict" not in config.read_text()
    cli.main(["init", "--data", str(data), *map(str, places[:4]), "--force"])
    assert "rows with an empty column, which are left out: 1\n" in capsys.readouterr().out
    config.write_text(config.read_text().replace('- " strong"', '- "strong"'))
    told = refused(capsys, "fit", "--config", config, "--trainer.accelerator=cpu", "--trainer.logger=false")
    assert "'strong' differs by space alone: write ' strong' in labels" in told


def test_free_text_of_one_task_is_named_after_the_file(tiny_base, tmp_path, capsys) -> None:
    rows = [{"story": f"the news of {number}", "title": f"news {number}"} for number in range(20)]
    data = write(tmp_path / "heads.of.jsonl", rows)
    held = write(tmp_path / "held.jsonl", rows[:3])
    config = tmp_path / "run.yaml"
    cli.main(
        ["init", "--data", str(data), "--base", str(tiny_base), "--output", str(config), "--validation", str(held)]
    )
    out = capsys.readouterr().out
    assert "Write the title for the text." in config.read_text()
    assert "heads: 20 rows, free text from the column 'title'" in out and f"fit --config {config}" in out
    made = yaml.safe_load(config.read_text())["data"]["init_args"]
    assert made["train"] == {"path": str(data), "task": "heads"} and made["validation"]["path"] == str(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.of.jsonl", "held.jsonl", "run.yaml"]
    assert fit(config, tmp_path, capsys)["tasks"] == ["heads"]


@pytest.mark.parametrize("name", ["run.yaml", "run.train.jsonl", "run.validation.jsonl"])
def test_nothing_is_written_over_unless_told(name: str, tiny_base, tmp_path, capsys) -> None:
    data = write(tmp_path / "reviews.jsonl", mixed())
    (tmp_path / name).write_text("mine")
    arguments = ["init", "--data", data, "--base", tiny_base, "--output", tmp_path / "run.yaml"]
    assert refused(capsys, *arguments).startswith(f"error: there is already {tmp_path / name}; give another --output")
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    said(capsys, *arguments, "--force")
    assert (tmp_path / name).read_text() != "mine" and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("data", ["run.yaml.jsonl", "run.train.jsonl", "run.validation.jsonl"])
def test_its_own_data_are_never_written_over(data: str, tiny_base, tmp_path, capsys) -> None:
    rows = write(tmp_path / data, mixed())
    before = rows.read_text()
    config = rows if data == "run.yaml.jsonl" else tmp_path / "run.yaml"
    arguments = ["init", "--data", rows, "--base", tiny_base, "--output", config]
    for more in ([], ["--force"]):
        assert f"{rows} is one of the files that are read" in refused(capsys, *arguments, *more)
    assert rows.read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_a_config_has_a_name(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "reviews.jsonl", mixed())
    said_ = refused(capsys, "init", "--data", data, "--base", tiny_base, "--output", ".")
    assert said_ == "error: '.' is a folder; give --output the name of a file in it"


def test_what_stands_in_the_data_changes_nothing_of_the_config(tiny_base, tmp_path, capsys) -> None:
    evil = 'x"\n  tasks: {}\n# \x1b[31m'
    rows = [{"text": f"film {i}", "label": [evil, "yes"][i % 2], "note": f"{evil} {i}\n{evil}"} for i in range(20)]
    config = tmp_path / "run.yaml"
    assert "may only hold newlines" in refused(
        capsys, "init", "--data", write(tmp_path / "a.jsonl", rows), "--base", tiny_base, "--output", config
    )
    assert not config.exists()
    rows = [{**row, "label": ['x": 1\n#', "yes"][i % 2]} for i, row in enumerate(rows)]
    said(capsys, "init", "--data", write(tmp_path / "a.jsonl", rows), "--base", tiny_base, "--output", config)
    made = yaml.safe_load(config.read_text())
    assert list(made["data"]["init_args"]["tasks"]) == ["a"] and list(made) == [
        "seed_everything",
        "prompts",
        "model",
        "data",
        "trainer",
    ]
    assert (
        made["data"]["init_args"]["tasks"]["a"]["labels"] == [' x": 1\n#', " yes"] and "\x1b" not in config.read_text()
    )


def test_a_column_of_tasks_that_there_is_not_is_refused(tiny_base, tmp_path, capsys) -> None:
    data = write(tmp_path / "rows.jsonl", mixed())
    places = ["--base", tiny_base, "--output", tmp_path / "run.yaml"]
    told = refused(capsys, "init", "--data", data, *places, "--task_column", "kind")
    assert told == "error: no row names its task in a column 'kind'; columns: 'task', 'text', 'label'"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_column_that_may_name_the_task_is_pointed_at(tiny_base, tmp_path, capsys) -> None:
    kinds = {"no": "verdict", "tone": "headline"}
    rows = [{"kind": kinds[row["task"]], "review": row["text"], "answer": row["label"]} for row in mixed()]
    hint = "no column 'task': if 'kind' (verdict, headline) names it, give --task_column kind"
    places = ["--base", tiny_base, "--output", tmp_path / "run.yaml", "--force", "--data"]
    told = said(capsys, "init", *places, write(tmp_path / "rows.jsonl", rows))
    assert told["hint"] == hint and len(told["tasks"]) == 1
    cli.main(["init", *map(str, places), str(tmp_path / "rows.jsonl")])
    assert f"\n{hint}\n" in capsys.readouterr().out
    for more in (["--task_column", "kind"], ["--task", "one"]):
        assert said(capsys, "init", *places, tmp_path / "rows.jsonl", *more)["hint"] is None
    for name, values in (("part", "ab"), ("kind", "12"), ("kind", [f"kind {number}" for number in range(9)])):
        odd = [{**row, name: values[number % len(values)]} for number, row in enumerate(rows)]
        assert said(capsys, "init", *places, write(tmp_path / "odd.jsonl", odd))["hint"] is None


def test_names_of_tasks_that_are_numbers_in_the_data_are_names_in_the_config(tiny_base, tmp_path, capsys) -> None:
    rows = [{**row, "task": {"no": 1, "tone": True}[row["task"]]} for row in mixed()]
    data, config = write(tmp_path / "a.jsonl", rows), tmp_path / "run.yaml"
    said(capsys, "init", "--data", data, "--base", tiny_base, "--output", config)
    assert fit(config, tmp_path, capsys)["tasks"] == ["1", "true"]


def test_lines_of_unicode_in_the_data_end_no_comment(tiny_base, tmp_path, capsys) -> None:
    rows = [{"text": f"film\u2028{i}\u2029of\x85it", "label": ["no", "yes"][i % 2]} for i in range(20)]
    config = tmp_path / "run.yaml"
    said(capsys, "init", "--data", write(tmp_path / "a.jsonl", rows), "--base", tiny_base, "--output", config)
    assert list(yaml.safe_load(config.read_text())["data"]["init_args"]["tasks"]) == ["a"]


def test_a_base_that_no_config_can_name_is_refused(tmp_path, capsys) -> None:
    data = write(tmp_path / "reviews.jsonl", mixed())
    said_ = refused(capsys, "init", "--data", data, "--base", "a\ud800", "--output", tmp_path / "run.yaml")
    assert "--base holds control characters" in said_ and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "is empty"),
        ([{"text": "a b"}] * 3, "needs a column of texts and one of what to answer"),
        ([{"text": "a b", "label": "c"}], "too few to hold some out"),
        ([{"text": "a b", "label": "c", "task": "a/b"}] * 3, "a task name has no path separators"),
    ],
)
def test_a_file_that_teaches_nothing_is_refused(rows, message: str, tiny_base, tmp_path, capsys) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    assert message in refused(capsys, "init", "--data", data, "--base", tiny_base, "--output", tmp_path / "run.yaml")
    assert len(list(tmp_path.iterdir())) == 1

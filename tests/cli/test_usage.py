"""What a parser refuses, in one line: place, what was expected, what is near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_softprompt import cli


def config(tmp_path: Path, base: Path, path: str, value: Any) -> Path:
    template = {"text": "{text} =>", "target": " {label}", "labels": [" good", " bad"]}
    made: dict[str, Any] = {
        "prompts": {"tasks": {"s": 3}},
        "model": {"class_path": "lightning_softprompt.CausalLMModule", "init_args": {"base": str(base)}},
        "data": {
            "class_path": "lightning_softprompt.TaskDataModule",
            "init_args": {"tokenizer": str(base), "tasks": {"s": template}, "train": "rows.jsonl"},
        },
        "trainer": {
            "logger": False,
            "callbacks": [{"class_path": "lightning_softprompt.CollapseGuard", "init_args": {}}],
        },
    }
    *above, last = path.split("/")
    node: Any = made
    for key in above:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    return tmp_path / "run.yaml"


MISTAKES = [
    ("trainer/max_epoch", 3, "trainer.max_epoch: 'max_epoch' is not known; do you mean 'max_epochs'?"),
    ("traner", {}, "traner: 'traner' is not known; do you mean 'trainer'?"),
    ("trainer", 5, "trainer: expected keys below it"),
    ("data/init_args/bach_size", 3, "data.init_args.bach_size: 'bach_size' is not known; do you mean 'batch_size'?"),
    ("data/init_args/batch_size", "many", "data.init_args.batch_size: expected a whole number, found 'many'"),
    ("data/init_args/tasks/s/tekst", "a", "tasks.s.tekst: 'tekst' is not known; do you mean 'text'?"),
    ("data/init_args/tasks/s", 5, "data.init_args.tasks.s: expected TaskTemplate, found '5'"),
    ("data/init_args/tasks/s/labels", [True, False], "tasks.s.labels: expected a list of texts or null, found"),
    ("data/init_args/tasks/s/labels", [True, False], "put quotes around it"),
    ("data/init_args/tasks/s/text", False, "tasks.s.text: expected a text, found 'False'; put quotes around it"),
    ("data/init_args/train", [{"path": "x", "tsk": "s"}], "train.0.tsk: 'tsk' is not known; do you mean 'task'?"),
    (
        "model/class_path",
        "lightning_softprompt.CausalLMModul",
        "model: lightning_softprompt has no 'CausalLMModul'; do you",
    ),
    ("model/class_path", "lightning_softprompt.TaskDataModule", "TaskDataModule is no CausalLMModule; give"),
    ("model/init_arg", {}, "model: 'init_arg' is not known beside class_path; do you mean 'init_args'?"),
    ("model/init_args/base", None, "model: base missing; give what is missing below it"),
    (
        "model/init_args/objective",
        "lable",
        "expected one of auto, labels, tokens, found 'lable'; do you mean 'labels'?",
    ),
    (
        "model/init_args/optimizer",
        {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1}},
        "optimizer.init_args.lrr: ",
    ),
    ("prompts/tasks/s", [1], "prompts.tasks.s: expected a whole number or Initializer or a text, found '[1]'"),
    ("prompts/taks", {}, "prompts.taks: 'taks' is not known; do you mean 'tasks'?"),
    ("trainer/callbacks/0/init_args/patence", 3, "callbacks.0.init_args.patence: 'patence' is not known; do you mean"),
    (
        "trainer/callbacks/0/class_path",
        "lightning_softprompt.CollapsGuard",
        "has no 'CollapsGuard'; do you mean 'Collaps",
    ),
]


@pytest.mark.parametrize("path, value, said", MISTAKES)
def test_a_mistake_in_a_config_is_one_line_with_its_place(path, value, said, tmp_path, tiny_base, capsys) -> None:
    file = config(tmp_path, tiny_base, path, value)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fit", "--config", str(file)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and line.startswith(f"error: {file}, line ") and said in line
    number = int(line.split("line ")[1].split(",")[0])
    key = line.split(": ")[1].split(", ")[-1].split(".")[-1]
    assert file.read_text().splitlines()[number - 1].strip(" -").startswith(f"{key}:")


@pytest.mark.parametrize(
    "path, value", [("data/init_args/batch_size", "many"), ("model/init_args/lr", 1), ("model/init_args/base", None)]
)
def test_a_config_in_a_folder_below_is_found_by_its_relative_path(
    path, value, tmp_path, tiny_base, capsys, monkeypatch
) -> None:
    (tmp_path / "my configs").mkdir()
    config(tmp_path / "my configs", tiny_base, path, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "my configs/run.yaml"])
    assert capsys.readouterr().err.startswith("error: my configs/run.yaml, line ")
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["fit"], "--prompts.tasks, --data, --model missing; give what is missing, in the config (--config run.yaml)"),
        (["fit", "--confg", "x"], "--confg is not known; do you mean '--config'?"),
        (["fit", "--config", "gone.yaml"], "File does not exist"),
        (["--foo", "fit"], "--foo is not known"),
        (["init", "--zzz", "x"], "--zzz is not known; known: --config, "),
        (["inspect"], "--prompts missing; give what is missing"),
        (["inspect", "--prompts", "a", "--nearst", "3"], "--nearst is not known; do you mean '--nearest'?"),
        (["inspect", "--prompt", "a"], "--prompt is not known; do you mean '--prompts'?"),
        (["init", "--data", "a", "--task_colum", "kind"], "--task_colum is not known; do you mean '--task_column'?"),
        (["fit", "--trainer.max_epoch", "3"], "--trainer.max_epoch is not known; do you mean '--trainer.max_epochs'?"),
        (["generate", "--max_new_tokens", "lots"], "--max_new_tokens: expected a whole number, found 'lots'"),
        (["merge", "--folders"], "--folders"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and line.startswith("error: ") and said in line
    assert "print_shtab" not in line


def test_with_debug_all_that_the_parser_said_stands_above(tmp_path, tiny_base, capsys) -> None:
    file = config(tmp_path, tiny_base, "data/init_args/bach_size", 3)
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(file), "--debug"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) > 5 and "Does not validate against any" in lines[1] and lines[-1].startswith("error: ")

"""The command line, in processes of its own and with every example config."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_softprompt import PromptGradientClipping, SoftPrompts, cli
from lightning_softprompt.cli.main import ROOMS
from lightning_softprompt.cli.output import say
from lightning_softprompt.cli.trainer import SoftPromptCLI
from tests import tiny

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))


class Own(PromptGradientClipping):
    """Somebody's own."""


def overrides(base: Path, folder: Path) -> list[str]:
    return [
        f"--model.init_args.base={base}",
        f"--data.init_args.tokenizer={base}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=false",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.max_epochs=2",
    ]


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lightning_softprompt.cli", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_config_runs(path: Path, tiny_base, tmp_path, monkeypatch, capsys) -> None:
    import datasets

    real = datasets.load_dataset

    def load(name, *arguments, **options):
        if name != "stanfordnlp/sst2":
            return real(name, *arguments, **options)
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
        )
        return datasets.Dataset.from_dict({"sentence": ["it is good", "so bad"], "label": [1, 0]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(ROOT)
    arguments = ["fit", "--config", str(path), *overrides(tiny_base, tmp_path)]
    if "max_steps" in path.read_text():
        arguments += ["--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    cli.main(arguments)
    folder = Path(capsys.readouterr().out.split("prompts saved in ")[1].splitlines()[0])
    assert folder == tmp_path / "prompts"
    saved = (tmp_path / "config.yaml").read_text()
    assert saved.count("PromptGradientClipping") == 1 and "gradient_clip_val: null" in saved
    prompts = SoftPrompts.from_pretrained(folder)
    assert prompts.hidden_size == 32
    for checkpoint in tmp_path.rglob("*.ckpt"):
        assert checkpoint.stat().st_size < 60_000
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert len(weights) == len(prompts)
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize(
    "said, count",
    [
        ([], 1),
        (["--trainer.gradient_clip_val=0"], 0),
        (["--trainer.gradient_clip_val=0.5"], 0),
        (["--trainer.callbacks+=lightning_softprompt.PromptGradientClipping", "--trainer.callbacks.scope=token"], 1),
        (["--trainer.callbacks+=lightning_softprompt.CollapseGuard"], 1),
        (["--trainer.callbacks+=tests.cli.test_trainer.Own"], 1),
    ],
)
def test_the_command_clips_each_task_where_nothing_is_said_about_it(
    said, count, tiny_base, tmp_path, monkeypatch
) -> None:
    seen = []

    def note(self: Trainer, *_: object, **__: object) -> None:
        seen.extend(c.scope for c in self.callbacks if isinstance(c, PromptGradientClipping))

    monkeypatch.setattr(Trainer, "fit", note)
    monkeypatch.setattr(SoftPromptCLI, "after_fit", lambda self: None)
    monkeypatch.chdir(ROOT)
    cli.main(["fit", "--config", "examples/free_text.yaml", *overrides(tiny_base, tmp_path), *said])
    assert seen == ["token" if "--trainer.callbacks.scope=token" in said else "task"] * count


def test_fit_resume_predict_and_generate_in_processes_of_their_own(tiny_base, tmp_path) -> None:
    config = ["--config", ROOT / "examples/mixed_tasks.yaml"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    every_epoch = [
        "--trainer.max_epochs=3",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.filename={epoch}",
    ]
    run("fit", *config, *overrides(tiny_base, whole), *every_epoch, f"--trainer.callbacks.dirpath={whole}")
    checkpoint = whole / "epoch=0.ckpt"
    more = [*every_epoch, f"--trainer.callbacks.dirpath={resumed}", "--ckpt_path", checkpoint]
    run("fit", *config, *overrides(tiny_base, resumed), *more)
    expected, found = (torch.load(f / "epoch=2.ckpt", weights_only=True) for f in (whole, resumed))
    assert expected["global_step"] == found["global_step"] == 9
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name

    out = run("predict", *config, *overrides(tiny_base, whole), "--ckpt_path", checkpoint)
    rows = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    assert f"3 predictions written to {whole / 'predictions.jsonl'}" in out.stdout
    assert [row["task"] for row in rows] == ["sentiment", "source", "sentiment"]
    assert rows[0]["answer"] in (" positive", " negative") and rows[1]["answer"] in (" film", " product")

    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"task": "sentiment", "text": "it is"}\n{"task": null, "text": "so", "id": 7}\n')
    arguments = ["generate", "--base", tiny_base, "--prompts", whole / "prompts", "--max_new_tokens", 3]
    run(*arguments, "--input", requests, "--output", tmp_path / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [set(row) - {"id"} for row in answers] == [{"task", "text", "output"}] * 2 and answers[1]["id"] == 7

    rows = [{"task": "sentiment", "text": "it", "error": "old"}, {"task": "tone", "text": "so"}, {"text": None}]
    requests.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"task": None, "text": "a film"}]))
    failed = run(*arguments, "--input", requests, "--output", tmp_path / "answers.jsonl", check=False)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [sorted(set(row) - {"task", "text"}) for row in answers] == [["output"], ["error"], ["error"], ["output"]]
    unknown = f"{requests}, line 2: unknown task 'tone'; known tasks: 'sentiment', 'source'"
    assert answers[1]["error"] == unknown
    assert f"{requests}, line 3: the template '{{text}}' needs the column 'text'" in answers[2]["error"]
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 2 of 4 rows have no answer") and last.endswith(f"the first: {unknown}")


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


def test_a_prediction_that_is_missing_ends_in_an_error(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = [{"task": "headline", "story": story} for story in ("it is so good", "the film " * 50)]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["predict", "--config=examples/free_text.yaml", *overrides(tiny_base, tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, f"--data.init_args.predict={tmp_path / 'stories.jsonl'}"])
    assert exit_.value.code == 1
    answers = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["answer"] is None for row in answers] == [False, True]
    assert "error: 1 of 2 rows have no answer, first row 2: null in" in capsys.readouterr().err


def test_a_prediction_of_some_batches_alone_holds_their_rows(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    limited = ["--trainer.limit_predict_batches=1", "--data.init_args.batch_size=2"]
    cli.main(["predict", "--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), *limited])
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["sentiment", "source"] and all(row["answer"] for row in rows)


def test_what_the_trainer_did_as_json(tiny_base, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    config = ["--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path)]
    found = {}
    for command in ("fit", "validate", "test", "predict"):
        more = ["--data.init_args.test=examples/data/reviews.validation.jsonl"] if command == "test" else []
        cli.main([command, *config, *more, "--json"])
        found[command] = json.loads(capsys.readouterr().out)  # all there is
    fit = found["fit"]
    assert SoftPrompts.from_pretrained(fit["prompts"]).tasks == tuple(fit["tasks"]) == ("sentiment", "source")
    assert fit["steps"] == 6 and torch.load(fit["checkpoint"], weights_only=True)["global_step"] in (3, 6)
    assert fit["monitor"] == "val/accuracy" and fit["best"] >= fit["metrics"]["val/accuracy"]
    names = {f"{name}{of}" for name in ("loss", "accuracy") for of in ("", "_micro", "/sentiment", "/source")}
    assert {f"val/{name}" for name in names} <= set(fit["metrics"])
    assert set(found["validate"]["metrics"]) == {f"val/{name}" for name in names}
    assert set(found["test"]["metrics"]) == {f"test/{name}" for name in names}
    rows = [json.loads(line) for line in Path(found["predict"]["predictions"]).read_text().splitlines()]
    assert found["predict"]["rows"] == len(rows) == 3 and found["predict"]["failed"] == 0
    cli.main(["validate", *config])
    assert "val/accuracy/source" in capsys.readouterr().out  # the table, for people


@pytest.mark.filterwarnings("ignore")
def test_prompts_are_left_whatever_keeps_checkpoints(tiny_base, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    other = ["--trainer.callbacks=lightning.pytorch.callbacks.OnExceptionCheckpoint"]
    other += [f"--trainer.callbacks.dirpath={tmp_path}", "--trainer.max_epochs=1", "--json"]
    cli.main(["fit", "--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), *other])
    done = json.loads(capsys.readouterr().out)
    assert done["checkpoint"] is None and len(SoftPrompts.from_pretrained(done["prompts"])) == 2


def test_what_is_no_number_is_null(capsys) -> None:
    say({"metrics": {"loss": math.nan, "all": [1.0, -math.inf]}}, True)
    assert json.loads(capsys.readouterr().out) == {"metrics": {"loss": None, "all": [1.0, None]}}


def test_help_of_every_command(capsys) -> None:
    cli.main([])
    assert "fit, validate, test, predict" in capsys.readouterr().out
    for command in ROOMS:
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, "--help"])
        assert exit_.value.code == 0
    assert "unknown" not in capsys.readouterr().out


def test_errors_end_with_one_line(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        cli.main(
            [
                "fit",
                "--config=examples/mixed_tasks.yaml",
                *overrides(tiny_base, tmp_path),
                "--data.init_args.train=gone.jsonl",
            ]
        )
    assert exit_.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: gone.jsonl does not exist")
    for argument in ("--model.init_args.base", "--data.init_args.tokenizer"):
        result = run(
            "fit",
            "--config=examples/mixed_tasks.yaml",
            *overrides(tiny_base, tmp_path),
            f"{argument}={tmp_path / 'gone'}",
            check=False,
        )
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert f"could be loaded from '{tmp_path / 'gone'}'; give the id of a model on the hub" in result.stderr


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (
            ["fit", "--data.init_args.train={path: a.jsonl, num_rows: 5}"],
            1,
            "num_rows must be at least 1 and belongs to",
        ),
        (["validate", "--data.init_args.validation=null"], 1, "there is no validation source"),
        (["validate", "--ckpt_path=gone.ckpt"], 1, "gone.ckpt"),
        (["fit", "--trainer.devices=0"], 1, "value is not a valid input using cpu accelerator"),
        (["add_task"], 2, "there is no command 'add_task'; commands: fit, validate, test, predict, generate, inspect"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments, status, message, tiny_base, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    command, *rest = arguments
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), *rest])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == status and last.startswith("error: ") and message in last


def test_prompts_go_to_adapters_of_peft_and_back(tmp_path, capsys) -> None:
    model = tiny.tiny_model("llama")
    prompts = SoftPrompts.for_model(model, {"alpha": 3, "beta": 5})
    prompts.save_pretrained(tmp_path / "prompts")
    cli.main(["export-peft", "--prompts", str(tmp_path / "prompts"), "--output", str(tmp_path / "adapters")])
    folders = capsys.readouterr().out.splitlines()
    assert folders == [str(tmp_path / "adapters" / task) for task in ("alpha", "beta")]
    back = str(tmp_path / "back")
    cli.main(["import-peft", "--adapters", f"[{folders[0]}]", "--output", back, "--task", "first"])
    cli.main(["import-peft", "--adapters", str(folders), "--output", back])
    assert "back holds first, alpha, beta" in capsys.readouterr().out
    found = SoftPrompts.from_pretrained(back)
    for task, name in {"first": "alpha", "alpha": "alpha", "beta": "beta"}.items():
        assert torch.equal(found[task], prompts[name])
    with pytest.raises(SystemExit):
        cli.main(["import-peft", "--adapters", str(folders), "--output", back])
    assert "both have a task 'alpha'" in capsys.readouterr().err
    assert len(SoftPrompts.from_pretrained(back)) == 3

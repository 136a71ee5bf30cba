"""The commands of the Trainer, in processes of their own and with every example config."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging

from lightning_softprompt import (
    BestPrompts,
    CausalLMModule,
    PromptDistillation,
    PromptGradientClipping,
    SoftPrompts,
    cli,
)
from lightning_softprompt.cli.trainer import SoftPromptCLI, _best_prompts
from tests.cli.command_line import ROOT, overrides, refused, run
from tests.training.distilled import save_chat_base

CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("command", ["predict", "test"])
def test_a_source_that_is_missing_is_found_before_the_model_is_loaded(command, tiny_base, tmp_path, capsys) -> None:
    lines = (ROOT / "examples/mixed_tasks.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "run.yaml").write_text("".join(line for line in lines if not line.startswith("    predict:")))
    options = [*overrides(tiny_base, tmp_path)[1:-1], "--model.init_args.base=nowhere"]
    told = refused(capsys, command, "--config", tmp_path / "run.yaml", *options)
    assert f"there is no {command} source; give TaskDataModule({command}=…), or data.init_args.{command} in a" in told


class Own(PromptGradientClipping):
    """Somebody's own."""


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
    base = save_chat_base(tmp_path / "base", "shop") if "chat: true" in path.read_text() else tiny_base
    arguments = ["fit", "--config", str(path), *overrides(base, tmp_path)]
    if "max_steps" in path.read_text():
        arguments += ["--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    cli.main(arguments)
    folder = Path(capsys.readouterr().out.split("prompts saved in ")[1].splitlines()[0])
    assert folder == tmp_path / "prompts"
    saved = (tmp_path / "config.yaml").read_text()
    assert saved.count("PromptGradientClipping") == 1 and "gradient_clip_val: null" in saved
    assert "method: normalized" in saved
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
    first = run("fit", *config, *overrides(tiny_base, whole), *every_epoch, f"--trainer.callbacks.dirpath={whole}")
    assert "Tip:" not in first.stdout + first.stderr
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
    read = [json.loads(line) for line in (ROOT / "examples/data/reviews.predict.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in given} for row, given in zip(rows, read, strict=True)] == read
    for row in rows:
        assert row["output"] == row["answer"] == max(row["probabilities"], key=row["probabilities"].get)
    assert set(rows[0]["probabilities"]) == {"positive", "negative"} and sum(
        rows[0]["probabilities"].values()
    ) == pytest.approx(1)

    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"task": "sentiment", "text": "it is"}\n{"task": null, "text": "so", "id": 7}\n')
    arguments = ["generate", "--base", tiny_base, "--prompts", whole / "prompts", "--max_new_tokens", 3]
    run(*arguments, "--input", requests, "--output", tmp_path / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [set(row) - {"task", "text"} for row in answers] == [{"output", "probabilities"}, {"output", "id"}]
    assert answers[1]["id"] == 7 and set(answers[0]["probabilities"]) == {"positive", "negative"}

    rows = [{"task": "sentiment", "text": "it", "error": "old"}, {"task": "tone", "text": "so"}]
    rows += [{"task": "sentiment", "text": None}]
    requests.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"task": None, "text": "a film"}]))
    failed = run(*arguments, "--input", requests, "--output", tmp_path / "answers.jsonl", check=False)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    added = [sorted(set(row) - {"task", "text"}) for row in answers]
    assert added == [["output", "probabilities"], ["error"], ["error"], ["output"]]
    unknown = f"{requests}, line 2: unknown task 'tone'; known tasks: 'sentiment', 'source'"
    assert answers[1]["error"] == unknown
    assert f"{requests}, line 3: the template '{{text}} =>' needs the column 'text'" in answers[2]["error"]
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 2 of 4 rows have no answer") and last.endswith(f"the first: {unknown}")


def test_a_prediction_that_is_missing_ends_in_an_error(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = [{"task": "headline", "story": story} for story in ("it is so good", "the film " * 50)]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["predict", "--config=examples/free_text.yaml", *overrides(tiny_base, tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, f"--data.init_args.predict={tmp_path / 'stories.jsonl'}"])
    assert exit_.value.code == 1
    answers = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["story"] for row in answers] == [row["story"] for row in rows]
    assert [row["answer"] is None for row in answers] == ["error" in row for row in answers] == [False, True]
    assert answers[1]["error"].startswith("row 2: ")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 2 rows have no answer") and last.endswith(f"the first: {answers[1]['error']}")


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
        if more:
            with pytest.raises(SystemExit):
                cli.main([command, *config, *more])
            assert "error: test judges trained prompts, and there are none" in capsys.readouterr().err
            more.append(f"--prompts.tasks={found['fit']['prompts']}")
        cli.main([command, *config, *more, "--json"])
        found[command] = json.loads(capsys.readouterr().out)  # all there is
    fit = found["fit"]
    assert SoftPrompts.from_pretrained(fit["prompts"]).tasks == tuple(fit["tasks"]) == ("sentiment", "source")
    assert fit["steps"] == 6 and torch.load(fit["checkpoint"], weights_only=True)["global_step"] in (3, 6)
    assert fit["monitor"] == "val/accuracy" and fit["best"] >= fit["metrics"]["val/accuracy"]
    kinds, parts = ("loss", "label_loss", "accuracy"), ("", "_micro", "/sentiment", "/source")
    names = {f"{name}{of}" for name in kinds for of in parts}
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


class Limited(Callback):
    """Somebody's own."""

    def __init__(self, limit: float | int | str | None = None) -> None:
        self.limit = limit


def test_a_limit_of_batches_is_read_as_a_number_of_them() -> None:
    """The first type that fits is taken, and 1.0 in place of 1 would be all batches."""
    code = (
        "import typing\n"
        "from lightning_softprompt.cli.trainer import Parser, Trainer\n"
        "[forget() for forget in typing._cleanups]\n"
        "typing.Union[float, int, str, None]\n"  # typing keeps this one, for every equal union
        "parser = Parser()\n"
        f"parser.add_class_arguments(__import__({__name__!r}, fromlist=['Limited']).Limited, 'own')\n"
        "parser.add_class_arguments(Trainer, 'trainer')\n"
        f'spec = \'{{"class_path": "{__name__}.Limited", "init_args": {{"limit": 2}}}}\'\n'
        "arguments = ['--own.limit=1', f'--trainer.callbacks={spec}', '--trainer.val_check_interval=0.5']\n"
        "read = parser.parse_args(arguments)\n"
        "limits = read.own.limit, read.trainer.callbacks.init_args.limit, read.trainer.val_check_interval\n"
        "print(*map(repr, limits))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2", "0.5"]


def chosen(*callbacks: object, model: object = None) -> BestPrompts | None:
    trainer = Trainer(callbacks=list(callbacks), accelerator="cpu", logger=False, enable_progress_bar=False)
    return _best_prompts(trainer, CausalLMModule("base") if model is None else model)


def test_each_task_keeps_its_best_prompt_unless_the_config_says_what_is_best(tmp_path: Path) -> None:
    own = BestPrompts({"val/f1": "max"})
    assert chosen(own) is own and chosen(own, ModelCheckpoint(tmp_path, monitor="val/loss")) is own
    assert chosen(ModelCheckpoint(tmp_path, monitor="val/loss")) is None
    assert chosen(StochasticWeightAveraging(1e-3)) is None and chosen(model=LightningModule()) is None
    usual = chosen(ModelCheckpoint(tmp_path))
    assert usual is not None and list(usual.monitors) == ["val/accuracy", "val/loss"]
    among = chosen(model=CausalLMModule("base", objective="labels"))
    assert among is not None and list(among.monitors) == ["val/accuracy", "val/label_loss", "val/loss"]
    distilled = chosen(model=PromptDistillation("base", {"a": "You are kind."}))
    assert distilled is not None and distilled.monitors == {"val/divergence": "min"}


def test_a_checkpoint_of_a_validation_knows_its_best_prompts(tiny_base, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["fit", "--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), "--trainer.max_epochs=2"]
    cli.main([*arguments, "--trainer.val_check_interval=0.5", "--trainer.callbacks=null"])
    capsys.readouterr()
    checkpoint = max(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    state = torch.load(checkpoint, weights_only=True)
    best = state["callbacks"]["BestPrompts"]
    assert best["validated"] == state["global_step"] and set(best["best"]) == {"sentiment", "source"}

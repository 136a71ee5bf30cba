"""The commands that look at folders of prompts and put them together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch.nn import functional

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate, Text, Tokens, cli
from lightning_softprompt.base import loading
from lightning_softprompt.cli import folders
from lightning_softprompt.cli.folders import _start_in_words, merge
from lightning_softprompt.interop.peft import export_peft
from lightning_softprompt.prompts.files import writing
from lightning_softprompt.prompts.inspection import CAVEAT
from tests import tiny
from tests.cli.command_line import refused, said, word_tokenizer_of


@pytest.fixture
def folder(tmp_path) -> str:
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"tone": Tokens([5, 6, 7]), "topic": 4, "same": Tokens([9, 9])})
    prompts.freeze("same")
    prompts.save_pretrained(tmp_path / "prompts")
    return str(tmp_path / "prompts")


def test_inspect_tells_what_the_prompts_are(folder, tiny_base, tmp_path, capsys) -> None:
    found = said(capsys, "inspect", "--prompts", folder, "--base", tiny_base, "--nearest", 2)
    assert found["hidden_size"] == 32 and [row["task"] for row in found["tasks"]] == ["tone", "topic", "same"]
    tone, topic, same = found["tasks"]
    embedding = tiny.tiny_model().get_input_embeddings().weight.detach()
    assert tone["token_norm"] == pytest.approx(float(embedding[5:8].norm(dim=1).mean()))
    assert (same["token_similarity"], same["effective_rank"]) == (pytest.approx(1, abs=1e-5),) * 2
    assert (tone["frozen"], same["frozen"], topic["length"]) == (False, True, 4)
    means = {row["task"]: SoftPrompts.from_pretrained(folder)[row["task"]].detach().mean(0) for row in found["tasks"]}
    cosines = {
        other: float(functional.cosine_similarity(means["tone"], means[other], dim=0)) for other in ("topic", "same")
    }
    assert tone["closest_task"] == max(cosines, key=cosines.__getitem__)
    assert tone["closest_cosine"] == pytest.approx(max(cosines.values()), abs=1e-5)
    words = word_tokenizer_of(tiny_base)
    for place, ids in enumerate([5, 6, 7]):
        nearest = tone["nearest_tokens"][place]
        assert nearest[0] == {"token": words.decode([ids]), "cosine": pytest.approx(1, abs=1e-5)} and len(nearest) == 2
        assert nearest[1]["cosine"] < 0.999


def test_inspect_draws_and_prints_tables(folder, tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["inspect", "--prompts", folder, "--base", str(tiny_base), "--plot", str(tmp_path / "new" / "prompts")])
    out = capsys.readouterr().out
    assert (
        "3 tasks, width 32" in out
        and "tone started from the tokens [5, 6, 7]" in out
        and "nearest tokens of 'topic'" in out
    )
    assert CAVEAT in out
    assert (tmp_path / "new" / "prompts").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (Text("it's (so)\n").describe(), 'the text "it\'s (so)\\n"'),
        (Text("a", 8).describe(), "the text 'a', cut or repeated to 8 tokens"),
        ("a tensor", "a tensor"),
        ("Normal(length=3)", "Normal(length=3)"),
    ],
)
def test_inspect_says_in_words_how_a_prompt_started(start: str, words: str) -> None:
    assert _start_in_words(start) == words


def test_an_earlier_figure_stays_where_no_whole_one_can_be_written(folder, tmp_path, capsys, monkeypatch) -> None:
    savefig = Figure.savefig

    def torn(self: Figure, to: Any, **options: Any) -> None:
        savefig(self, to, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", torn)
    (tmp_path / "plot.png").write_text("earlier")
    assert "No space" in refused(capsys, "inspect", "--prompts", folder, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_text() == "earlier"


def test_tasks_come_and_go(folder, tiny_base, tmp_path, capsys) -> None:
    before = SoftPrompts.from_pretrained(folder)
    labels = '{"class_path": "lightning_softprompt.Labels", "init_args": {"words": ["good", "bad"], "length": 3}}'
    for task, start in (("text", "is it good"), ("drawn", "6"), ("labels", labels)):
        found = said(capsys, "add-task", "--prompts", folder, "--task", task, "--start", start, "--base", tiny_base)
        assert found["tasks"][-1] == task
    assert found == {"prompts": folder, "tasks": ["tone", "topic", "same", "text", "drawn", "labels"]}
    after = SoftPrompts.from_pretrained(folder)
    assert after.lengths[3:] == (3, 6, 3) and after.base == before.base
    assert "'text'" in refused(
        capsys, "add-task", f"--prompts={folder}", "--task=text", "--start=2", f"--base={tiny_base}"
    )
    found = said(capsys, "remove-task", "--prompts", folder, "--tasks", "[tone, drawn]")
    assert found["tasks"] == ["topic", "same", "text", "labels"]
    last = SoftPrompts.from_pretrained(folder)
    assert torch.equal(last["topic"], before["topic"]) and not last["same"].requires_grad
    assert "unknown task 'gone'" in refused(capsys, "remove-task", "--prompts", folder, "--tasks", "[topic, gone]")
    assert len(SoftPrompts.from_pretrained(folder)) == 4
    new = tmp_path / "new"
    assert "Give --base" in refused(capsys, "add-task", f"--prompts={new}", "--task=a", "--start=2")
    said(capsys, "add-task", f"--prompts={new}", "--task=a", "--start=2", f"--base={tiny_base}")
    SoftPrompts.from_pretrained(new).base.check(tiny.tiny_model())


def test_folders_are_merged_whole_or_not_at_all(folder, tmp_path, capsys) -> None:
    other, foreign, wide = tmp_path / "other", tmp_path / "foreign", tmp_path / "wide"
    SoftPrompts.for_model(tiny.tiny_model(), {"spam": 5}).save_pretrained(other)
    SoftPrompts.for_model(tiny.tiny_model(seed=1), {"news": 5}).save_pretrained(foreign)
    without_base = SoftPrompts(7)
    without_base.add("wide", torch.ones(2, 7))
    without_base.save_pretrained(wide)
    output = tmp_path / "all"
    found = said(capsys, "merge", "--folders", f"[{folder}, {other}]", "--output", output)
    assert found["tasks"] == ["tone", "topic", "same", "spam"]
    merged = SoftPrompts.from_pretrained(output)
    assert not merged["same"].requires_grad and merged.starts["tone"] == "Tokens(ids=[5, 6, 7])" and merged.base
    for task in ("tone", "same"):
        assert torch.equal(merged[task], SoftPrompts.from_pretrained(folder)[task])
    for wrong, message in (
        (other, "both have a task 'spam'"),
        (foreign, "prompts of different base models"),
        (wide, "(width 32) and without a name (width 7)"),
    ):
        assert message in refused(capsys, "merge", "--folders", f"[{wrong}]", "--output", output)
        assert SoftPrompts.from_pretrained(output).tasks == merged.tasks


def test_prompts_are_taken_over_whole_or_not_at_all() -> None:
    one, other = (SoftPrompts.for_model(tiny.tiny_model(), tasks) for tasks in ({"a": 2}, {"b": 2, "c": 2}))
    other["c"].data[0, 0] = float("nan")
    with pytest.raises(SoftPromptError, match="'c' must hold finite"):
        one.update(other)
    assert one.tasks == ("a",)
    with pytest.raises(SoftPromptError, match="at least one folder"):
        merge([], "somewhere")


def test_prompts_go_to_adapters_of_peft_and_back(tmp_path, capsys) -> None:
    model = tiny.tiny_model("llama")
    prompts = SoftPrompts.for_model(model, {"alpha": 3, "beta": 5})
    prompts.save_pretrained(tmp_path / "prompts")
    cli.main(["export-peft", "--prompts", str(tmp_path / "prompts"), "--output", str(tmp_path / "adapters")])
    written = capsys.readouterr().out.splitlines()
    assert written == [str(tmp_path / "adapters" / task) for task in ("alpha", "beta")]
    back = str(tmp_path / "back")
    cli.main(["import-peft", "--adapters", f"[{written[0]}]", "--output", back, "--task", "first"])
    cli.main(["import-peft", "--adapters", str(written), "--output", back])
    assert "back holds first, alpha, beta" in capsys.readouterr().out
    found = SoftPrompts.from_pretrained(back)
    for task, name in {"first": "alpha", "alpha": "alpha", "beta": "beta"}.items():
        assert torch.equal(found[task], prompts[name])
    with pytest.raises(SystemExit):
        cli.main(["import-peft", "--adapters", str(written), "--output", back])
    assert "both have a task 'alpha'" in capsys.readouterr().err
    assert len(SoftPrompts.from_pretrained(back)) == 3


TONE = TaskTemplate("{text} =>", " {tone}", [" good", " bad"])


def test_a_task_is_renamed(folder, capsys) -> None:
    before = SoftPrompts.from_pretrained(folder)
    found = said(capsys, "rename-task", "--prompts", folder, "--task", "same", "--to", "情感")
    assert found == {"prompts": folder, "tasks": ["tone", "topic", "情感"]}
    after = SoftPrompts.from_pretrained(folder)
    assert torch.equal(after["情感"], before["same"]) and after.starts["情感"] == before.starts["same"]
    assert not after["情感"].requires_grad
    for task, to, message in (
        ("gone", "new", "unknown task 'gone'"),
        ("tone", "topic", "there is a task 'topic' already"),
        ("tone", "a/b", "no path separators"),
    ):
        assert message in refused(capsys, "rename-task", f"--prompts={folder}", f"--task={task}", f"--to={to}")
    assert SoftPrompts.from_pretrained(folder).tasks == after.tasks


def test_templates_go_with_their_tasks(folder, tiny_base, tmp_path, capsys) -> None:
    prompts = SoftPrompts.from_pretrained(folder)
    prompts.templates["tone"] = TONE
    prompts.save_pretrained(folder)
    said(capsys, "add-task", f"--prompts={folder}", "--task=more", "--start=2", f"--base={tiny_base}")
    said(capsys, "remove-task", "--prompts", folder, "--tasks", "[same]")
    said(capsys, "rename-task", f"--prompts={folder}", "--task=tone", "--to=mood")
    said(capsys, "merge", "--folders", f"[{folder}]", "--output", tmp_path / "merged")
    adapters = said(capsys, "export-peft", f"--prompts={tmp_path / 'merged'}", f"--output={tmp_path / 'adapters'}")
    said(capsys, "import-peft", "--adapters", f"[{adapters['adapters']['mood']}]", "--output", tmp_path / "back")
    for where in (folder, tmp_path / "merged", tmp_path / "back"):
        assert SoftPrompts.from_pretrained(where).templates == {"mood": TONE}
    said(capsys, "remove-task", "--prompts", folder, "--tasks", "[mood]")
    assert not SoftPrompts.from_pretrained(folder).templates


def test_an_adapter_of_another_base_is_not_imported(folder, tmp_path, capsys) -> None:
    model = tiny.tiny_model()
    model.config._name_or_path = "mine/base"
    SoftPrompts.for_model(model, {"own": 2}).save_pretrained(folder)
    export_peft(SoftPrompts.for_model(model, {"tone": 2}), "tone", tmp_path / "adapter", "another/base")
    last = refused(capsys, "import-peft", "--adapters", f"[{tmp_path / 'adapter'}]", "--output", folder)
    assert "'another/base'" in last and "'mine/base'" in last
    assert SoftPrompts.from_pretrained(folder).tasks == ("own",)
    assert "nothing to import" in refused(capsys, "import-peft", "--adapters", "[]", "--output", folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ["remove-task", "--tasks=[a]"],
        ["rename-task", "--task=a", "--to=b"],
        ["add-task", "--task=a", "--start=2", "--base=gone"],
    ],
)
def test_a_command_that_fails_leaves_no_folder(arguments, tmp_path, capsys) -> None:
    refused(capsys, *arguments, "--prompts", tmp_path / "new" / "prompts")
    assert not list(tmp_path.iterdir())


def test_commands_that_change_a_folder_at_once_all_count(folder, tmp_path, monkeypatch) -> None:
    """No command enters the folder before all of them have come to its door."""
    SoftPrompts.for_model(tiny.tiny_model(), {"spam": 5}).save_pretrained(tmp_path / "other")
    export_peft(SoftPrompts.for_model(tiny.tiny_model(), {"news": 2}), "news", tmp_path / "adapter")
    commands = [
        lambda: folders.add_task(folder, "x", 3, "base"),
        lambda: folders.add_task(folder, "y", 3, "base"),
        lambda: folders.remove_task(folder, ["same"]),
        lambda: folders.rename_task(folder, "tone", "mood"),
        lambda: folders.merge([str(tmp_path / "other")], folder),
        lambda: folders.import_peft([str(tmp_path / "adapter")], folder),
    ]
    door, model = threading.Barrier(len(commands), timeout=60), tiny.tiny_model()

    @contextmanager
    def enter(where):
        door.wait()
        with writing(where):
            yield

    monkeypatch.setattr(folders, "writing", enter)
    monkeypatch.setattr(loading, "load_causal_lm", lambda name: model)
    with ThreadPoolExecutor(len(commands)) as pool:
        for running in [pool.submit(command) for command in commands]:
            running.result()
    assert sorted(SoftPrompts.from_pretrained(folder)) == ["mood", "news", "spam", "topic", "x", "y"]


def test_prompts_are_extracted_from_a_checkpoint(tmp_path, capsys) -> None:
    prompts = SoftPrompts.for_model(tiny.tiny_model("llama"), {"beta": 3, "alpha": 5})
    values = {f"model.soft_prompts.prompt:{task}": prompts[task].detach() for task in prompts}
    torch.save({"state_dict": values, "soft_prompts": prompts.description().content()}, tmp_path / "run.ckpt")
    output = tmp_path / "prompts"
    SoftPrompts.for_model(tiny.tiny_model("llama"), {"old": 3}).save_pretrained(output)
    found = said(capsys, "extract", "--checkpoint", tmp_path / "run.ckpt", "--output", output)
    assert found == {"prompts": str(output), "tasks": ["beta", "alpha"]}
    again = SoftPrompts.from_pretrained(output)
    assert again.base == prompts.base and all(torch.equal(again[task], prompts[task]) for task in prompts)
    gone = refused(capsys, "extract", f"--checkpoint={tmp_path / 'gone.ckpt'}", f"--output={output}")
    assert gone.startswith(f"error: there is no checkpoint {tmp_path / 'gone.ckpt'}")
    assert SoftPrompts.from_pretrained(output).tasks == again.tasks

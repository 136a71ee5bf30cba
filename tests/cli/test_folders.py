"""The commands that look at folders of prompts and put them together."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lightning_softprompt import MixedTaskGenerator, SoftPromptError, SoftPrompts, Tokens, cli
from lightning_softprompt.cli.folders import merge
from lightning_softprompt.prompts.inspection import CAVEAT, nearest_tokens
from lightning_softprompt.prompts.statistics import prompt_statistics
from tests import tiny
from tests.tokenizer import word_tokenizer


@pytest.fixture
def folder(tmp_path) -> str:
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"tone": Tokens([5, 6, 7]), "topic": 4, "same": Tokens([9, 9])})
    prompts.freeze("same")
    prompts.save_pretrained(tmp_path / "prompts")
    return str(tmp_path / "prompts")


def said(capsys, *arguments: object) -> Any:
    cli.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(map(str, arguments)))
    assert exit_.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


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


def word_tokenizer_of(base: Path) -> Any:
    from lightning_softprompt.base.loading import load_tokenizer

    return load_tokenizer(base)


def test_the_nearest_tokens_are_those_of_the_whole_vocabulary(monkeypatch) -> None:
    model = tiny.tiny_model()
    prompts = SoftPrompts.for_model(model, {"a": 3, "b": 5})
    words = word_tokenizer([f"w{number}" for number in range(80)])
    monkeypatch.setattr("lightning_softprompt.prompts.inspection._CHUNK", 7)
    whole = nearest_tokens(prompts, model, words, 4)
    table = functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    for task in prompts:
        cosines, ids = (functional.normalize(prompts[task].detach(), dim=1) @ table.T).topk(4, dim=1)
        assert [each.token for each in whole[task]] == words.batch_decode(ids.flatten()[:, None].tolist())
        assert [each.cosine for each in whole[task]] == pytest.approx(cosines.flatten().tolist(), abs=1e-6)


def test_inspect_draws_and_prints_tables(folder, tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["inspect", "--prompts", folder, "--base", str(tiny_base), "--plot", str(tmp_path / "new" / "prompts")])
    out = capsys.readouterr().out
    assert "3 tasks, width 32" in out and "Tokens(ids=[5, 6, 7])" in out and "nearest tokens of 'topic'" in out
    assert CAVEAT in out
    assert (tmp_path / "new" / "prompts").read_bytes().startswith(b"\x89PNG")


def test_one_task_is_compared_with_none() -> None:
    prompts = SoftPrompts(4)
    assert prompt_statistics(prompts) == []
    prompts.add("alone", torch.ones(1, 4))
    assert prompt_statistics(prompts)[0].closest_task is None and prompt_statistics(prompts)[0].token_similarity == 0


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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_its_options(shell, tmp_path, capsys) -> None:
    cli.main(["completion", "--shell", shell])
    script = capsys.readouterr().out
    for word in ("fit", "remove-task", "max_batch_tokens", "ckpt_path"):
        assert word in script
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        assert subprocess.run(["bash", "-n", tmp_path / "script"]).returncode == 0
    assert "bash, zsh, " in refused(capsys, "completion", "--shell", "nosh")


def test_prompts_are_taken_over_whole_or_not_at_all() -> None:
    one, other = (SoftPrompts.for_model(tiny.tiny_model(), tasks) for tasks in ({"a": 2}, {"b": 2, "c": 2}))
    other["c"].data[0, 0] = float("nan")
    with pytest.raises(SoftPromptError, match="'c' must hold finite"):
        one.update(other)
    assert one.tasks == ("a",)
    with pytest.raises(SoftPromptError, match="at least one folder"):
        merge([], "somewhere")


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

"""Saved prompts: whole or not at all, and checked before anything is made of them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_softprompt import Normal, SoftPromptError, SoftPrompts, TaskTemplate, Tokens, attach
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.prompts.index import INDEX_NAME
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    model = tiny.tiny_model("llama")
    model.config._name_or_path = "some/base"
    prompts = SoftPrompts.for_model(model, {"b": Tokens([5, 6, 7]), "a": Normal(2)})
    prompts.freeze("a")
    prompts.save_pretrained(tmp_path / "prompts")
    return tmp_path / "prompts"


def tensors_of(folder):
    return next(folder.glob("*.safetensors"))


def edit(folder, change) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_save_is_one_safetensors_file_and_one_json(folder) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {INDEX_NAME, "README.md", ".soft_prompts.lock", tensors_of(folder).name}
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["base_model"]["name"] == "some/base" and index["hidden_size"] == 32
    assert [(t["task"], t["length"], t["start"], t["frozen"]) for t in index["tasks"]] == [
        ("b", 3, "Tokens(ids=[5, 6, 7])", False),
        ("a", 2, "Normal(length=2, scale=1.0)", True),
    ]
    assert index["library_version"] and index["format_version"] == 2


def test_a_second_process_loads_the_same(folder) -> None:
    prompts = SoftPrompts.from_pretrained(folder)
    code = (
        "import sys; from lightning_softprompt import SoftPrompts\n"
        "p = SoftPrompts.from_pretrained(sys.argv[1]); p.save_pretrained(sys.argv[2]); print(p.tasks)"
    )
    copy = folder.parent / "copy"
    out = subprocess.run([sys.executable, "-c", code, folder, copy], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "('b', 'a')"
    assert (copy / INDEX_NAME).read_bytes() == (folder / INDEX_NAME).read_bytes()
    assert tensors_of(copy).read_bytes() == tensors_of(folder).read_bytes()
    assert not prompts["a"].requires_grad and prompts["b"].requires_grad


def test_saving_again_replaces_the_whole(folder) -> None:
    prompts = SoftPrompts.from_pretrained(folder)
    prompts.remove("a")
    prompts["b"].data += 1
    prompts.save_pretrained(folder)
    assert len(list(folder.iterdir())) == 4
    again = SoftPrompts.from_pretrained(folder)
    assert again.tasks == ("b",) and torch.equal(again["b"], prompts["b"])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_save_that_fails_leaves_the_earlier_one_whole(folder, at: int, monkeypatch) -> None:
    prompts = SoftPrompts.from_pretrained(folder)
    before = prompts["b"].detach().clone()
    prompts["b"].data += 1
    calls = []

    def fail(source, target, real=os.replace):
        calls.append(target)
        if len(calls) > at:
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SoftPromptError, match=r"prompts cannot be written \(disk full\)"):
        prompts.save_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(SoftPrompts.from_pretrained(folder)["b"], before)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == [".soft_prompts.lock"]


def test_nan_is_not_saved(folder) -> None:
    prompts = SoftPrompts.from_pretrained(folder)
    prompts["b"].data[0, 0] = float("inf")
    with pytest.raises(SoftPromptError, match="'b' holds NaN or Inf and is not saved"):
        prompts.save_pretrained(folder)
    SoftPrompts.from_pretrained(folder)


def rewrite(folder, change) -> None:
    tensors = load_file(tensors_of(folder))
    change(tensors)
    save_file(tensors, tensors_of(folder))


def truncate(folder, path_of) -> None:
    path = path_of(folder)
    path.write_bytes(path.read_bytes()[:-20])


HOSTILE = {
    "the folder around it": (
        lambda f: ((f / "prompts").mkdir(), (f / INDEX_NAME).rename(f / "prompts" / INDEX_NAME)),
        "do you mean .*prompts.?",
    ),
    "truncated tensors": (lambda f: truncate(f, tensors_of), "truncated or not a safetensors file"),
    "empty tensors": (lambda f: tensors_of(f).write_bytes(b""), "truncated or not a safetensors file"),
    "pickle": (lambda f: torch.save({"a": torch.zeros(2)}, tensors_of(f)), "not a safetensors file"),
    "tensors are a folder": (
        lambda f: (
            tensors_of(f).unlink(),
            (f / "x.safetensors").mkdir(),
            edit(f, lambda i: i.update(tensors="x.safetensors")),
        ),
        "cannot be read",
    ),
    "truncated index": (lambda f: truncate(f, lambda g: g / INDEX_NAME), "truncated or not JSON"),
    "no index": (lambda f: (f / INDEX_NAME).unlink(), "there is no soft_prompts.json"),
    "no tensors": (lambda f: tensors_of(f).unlink(), "is missing, though soft_prompts.json names it"),
    "not an index": (
        lambda f: (f / INDEX_NAME).write_text("[]"),
        "does not describe its prompts; give the folder of a save",
    ),
    "NaN": (lambda f: rewrite(f, lambda t: t["prompt:b"].fill_(float("nan"))), "'b' holds NaN or Inf"),
    "Inf": (lambda f: rewrite(f, lambda t: t["prompt:a"].fill_(float("inf"))), "'a' holds NaN or Inf"),
    "other bytes": (lambda f: rewrite(f, lambda t: t["prompt:b"].add_(1)), "not the file that soft_prompts.json was"),
    "dtype": (lambda f: rewrite(f, lambda t: t.update({"prompt:b": t["prompt:b"].half()})), "should be float32"),
    "extra task": (lambda f: rewrite(f, lambda t: t.update(x=torch.zeros(1))), "do not hold the same tasks"),
    "hidden size": (lambda f: edit(f, lambda i: i.update(hidden_size=33)), r"should be float32 \[3, 33\]"),
    "length": (lambda f: edit(f, lambda i: i["tasks"][0].update(length=9)), r"should be float32 \[9, 32\]"),
    "version": (lambda f: edit(f, lambda i: i.update(format_version=99)), "format version 99.*upgrade"),
    "missing field": (lambda f: edit(f, lambda i: i.pop("tasks")), "'tasks' must be a list, found None"),
    "damaged entry": (lambda f: edit(f, lambda i: i["tasks"][0].pop("start")), "is damaged: each task must have"),
    "task is a path": (lambda f: edit(f, lambda i: i["tasks"][0].update(task="../x")), "no path separators"),
    "tensors elsewhere": (lambda f: edit(f, lambda i: i.update(tensors="../x.safetensors")), "outside its folder"),
    "task twice": (lambda f: edit(f, lambda i: i["tasks"].append(i["tasks"][0])), "holds a task twice"),
    "task left out": (lambda f: edit(f, lambda i: i["tasks"].pop()), "do not hold the same tasks"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(folder, case: str) -> None:
    spoil, message = HOSTILE[case]
    spoil(folder)
    with pytest.raises(SoftPromptError, match=message):
        SoftPrompts.from_pretrained(folder)


def test_loaded_prompts_know_their_base(folder) -> None:
    prompts = SoftPrompts.from_pretrained(folder)
    attach(tiny.tiny_model("llama"), prompts)
    with pytest.raises(SoftPromptError, match="made for another base model \\(some/base"):
        attach(tiny.tiny_model("llama", seed=9), SoftPrompts.from_pretrained(folder))


def test_templates_are_saved_with_their_tasks(folder) -> None:
    prompts = SoftPrompts.from_pretrained(folder)
    assert not prompts.templates
    prompts.templates["a"] = TaskTemplate("{text}\n=>", " {tone}", labels=[" good", " bad"], chat=True, system="So.")
    prompts.save_pretrained(folder)
    again = SoftPrompts.from_pretrained(folder)
    assert again.templates == prompts.templates and again.templates["a"] is not prompts.templates["a"]


@pytest.mark.parametrize(
    ("task", "template", "message"),
    [
        ("gone", TaskTemplate(), "there is a template of task 'gone', and no such task"),
        ("b", "{text}", "the template of task 'b' must be a TaskTemplate, got '{text}'"),
        ("b", TaskTemplate("{text"), "task 'b': the template '{text' has unbalanced braces"),
        ("b", TaskTemplate("\x1b[2J"), "task 'b': of the control characters"),
    ],
)
def test_a_template_that_cannot_be_used_is_not_saved(folder, task: str, template, message: str) -> None:
    prompts = SoftPrompts.from_pretrained(folder)
    prompts["b"].data += 1
    prompts.templates[task] = template
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for where in (folder, folder.parent / "new"):
        with pytest.raises(SoftPromptError) as caught:
            prompts.save_pretrained(where)
        assert str(caught.value).startswith(message)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (folder.parent / "new").exists()


def test_what_would_not_load_again_is_not_saved(tmp_path) -> None:
    prompts = SoftPrompts(4, BaseModel("some/base", 4, (0,), (float("nan"),)))
    with pytest.raises(SoftPromptError, match="'fingerprint' of the base must hold numbers"):
        prompts.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_only_shown_stops_no_save(tmp_path) -> None:
    class Loud(Tokens):
        def describe(self) -> str:
            return "two\nlines\x1b[2J"

    model = tiny.tiny_model("llama")
    model.config._name_or_path = "base\x07"
    SoftPrompts.for_model(model, {"a": Loud([5])}).save_pretrained(tmp_path)
    prompts = SoftPrompts.from_pretrained(tmp_path)
    assert prompts.starts["a"] == "two\\nlines\\x1b[2J" and prompts.base.name == "base\\x07"


def test_what_a_killed_writer_left_goes_with_the_next_save(folder) -> None:
    left = ["soft_prompts-000000000000.safetensors", ".soft_prompts-0123456789abcdef"]
    left += [".soft_prompts.json.k2_x8w1q", ".soft_prompts-000000000000.safetensors.k2_x8w1q"]
    kept = ["notes.txt", ".README.md.swp", "other.safetensors"]
    for name in left + kept:
        (folder / name).write_text("x")
    prompts = SoftPrompts.from_pretrained(folder)
    prompts.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert not names & set(left) and names >= set(kept) and len(names) == 4 + len(kept)


def test_files_keep_their_permissions(folder) -> None:
    for path in folder.iterdir():
        path.chmod(0o640)
    prompts = SoftPrompts.from_pretrained(folder)
    prompts["b"].data += 1
    old = tensors_of(folder).name
    prompts.save_pretrained(folder)
    assert tensors_of(folder).name != old
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_a_reader_beside_a_writer_sees_one_whole_save(folder, monkeypatch) -> None:
    """The writer comes between the reading of the index and the reading of the tensors that it names."""
    real, saves = Path.read_bytes, []
    prompts = SoftPrompts.from_pretrained(folder)

    def read(path: Path) -> bytes:
        data = real(path)
        if path.name == INDEX_NAME and len(saves) < 3:
            saves.append(1)
            prompts["b"].data.fill_(len(saves))
            monkeypatch.setattr(Path, "read_bytes", real)
            prompts.save_pretrained(folder)
            monkeypatch.setattr(Path, "read_bytes", read)
        return data

    monkeypatch.setattr(Path, "read_bytes", read)
    assert SoftPrompts.from_pretrained(folder)["b"].unique().tolist() == [3] and len(saves) == 3


def test_two_processes_save_into_one_folder(tmp_path) -> None:
    code = (
        "import sys, torch; from lightning_softprompt import SoftPrompts\n"
        "prompts = SoftPrompts(64); name = sys.argv[2]\n"
        "for number in range(8): prompts.add(f'{name}{number}', torch.zeros(20, 64))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for number in range(30):\n"
        "    for task in prompts: prompts[task].data.fill_(number + 0.5 * (name == 'y'))\n"
        "    prompts.save_pretrained(sys.argv[1])\n"
    )
    start = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    loads = 0
    with subprocess.Popen([*start, "x"], **pipes) as one, subprocess.Popen([*start, "y"], **pipes) as other:
        assert one.stdout.readline() == other.stdout.readline() == "ready\n"
        for writer in (one, other):
            writer.stdin.write("\n")
            writer.stdin.flush()
        while one.poll() is None or other.poll() is None:
            if (tmp_path / INDEX_NAME).is_file():
                prompts = SoftPrompts.from_pretrained(tmp_path)
                assert len({task[0] for task in prompts}) == 1 and len(prompts) == 8
                assert len({float(value) for task in prompts for value in prompts[task].detach().unique()}) == 1
                loads += 1
        assert [writer.stderr.read() for writer in (one, other)] == ["", ""]
    assert loads and next(SoftPrompts.from_pretrained(tmp_path).parameters()).max() >= 29
    assert len(list(tmp_path.iterdir())) == 4

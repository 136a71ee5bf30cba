"""Saved prompts: whole or not at all, and checked before anything is made of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_softprompt import Normal, SoftPromptError, SoftPrompts, Tokens, attach
from lightning_softprompt.prompts.folder import INDEX_NAME
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
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"]
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["base_model"]["name"] == "some/base" and index["hidden_size"] == 32
    assert [(t["task"], t["length"], t["start"], t["frozen"]) for t in index["tasks"]] == [
        ("b", 3, "Tokens(ids=[5, 6, 7])", False),
        ("a", 2, "Normal(length=2, scale=1.0)", True),
    ]
    assert index["library_version"] and index["format_version"] == 1


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
    assert len(list(folder.iterdir())) == 2
    again = SoftPrompts.from_pretrained(folder)
    assert again.tasks == ("b",) and torch.equal(again["b"], prompts["b"])


@pytest.mark.parametrize("at", [0, 1])
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
    with pytest.raises(OSError, match="disk full"):
        prompts.save_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(SoftPrompts.from_pretrained(folder)["b"], before)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


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
    "truncated tensors": (lambda f: truncate(f, tensors_of), "truncated or not a safetensors file"),
    "empty tensors": (lambda f: tensors_of(f).write_bytes(b""), "truncated or not a safetensors file"),
    "pickle": (lambda f: torch.save({"a": torch.zeros(2)}, tensors_of(f)), "not a safetensors file"),
    "truncated index": (lambda f: truncate(f, lambda g: g / INDEX_NAME), "truncated or not JSON"),
    "no index": (lambda f: (f / INDEX_NAME).unlink(), "there is no soft_prompts.json"),
    "no tensors": (lambda f: tensors_of(f).unlink(), "is missing, though soft_prompts.json names it"),
    "not an index": (lambda f: (f / INDEX_NAME).write_text("[]"), "not an index of saved prompts"),
    "NaN": (lambda f: rewrite(f, lambda t: t["prompt:b"].fill_(float("nan"))), "'b' holds NaN or Inf"),
    "Inf": (lambda f: rewrite(f, lambda t: t["prompt:a"].fill_(float("inf"))), "'a' holds NaN or Inf"),
    "other bytes": (lambda f: rewrite(f, lambda t: t["prompt:b"].add_(1)), "not the file that soft_prompts.json was"),
    "dtype": (lambda f: rewrite(f, lambda t: t.update({"prompt:b": t["prompt:b"].half()})), "should be float32"),
    "extra task": (lambda f: rewrite(f, lambda t: t.update(x=torch.zeros(1))), "do not hold the same tasks"),
    "hidden size": (lambda f: edit(f, lambda i: i.update(hidden_size=33)), r"should be float32 \[3, 33\]"),
    "length": (lambda f: edit(f, lambda i: i["tasks"][0].update(length=9)), r"should be float32 \[9, 32\]"),
    "version": (lambda f: edit(f, lambda i: i.update(format_version=99)), "format version 99.*upgrade"),
    "missing field": (lambda f: edit(f, lambda i: i.pop("tasks")), "'tasks' must be a list, found None"),
    "damaged entry": (lambda f: edit(f, lambda i: i["tasks"][0].pop("start")), "is damaged"),
    "task is a path": (lambda f: edit(f, lambda i: i["tasks"][0].update(task="../x")), "no path separators"),
    "tensors elsewhere": (lambda f: edit(f, lambda i: i.update(tensors="../x.safetensors")), "outside its folder"),
    "task twice": (lambda f: edit(f, lambda i: i["tasks"].append(i["tasks"][0])), "do not hold the same tasks"),
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

"""Tests of reading saved prompts, against the library that wrote them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.saved_prompts import read_saved_prompts
from softprompt_vllm.templates import Template

from lightning_softprompt import SoftPrompts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_and_templates_are_those_that_were_saved(saved: Path, bank: SoftPrompts, dtype: torch.dtype) -> None:
    found = read_saved_prompts(saved, dtype)
    assert list(found.tasks) == list(bank.tasks) and found.hidden_size == 32
    for name, task in found.tasks.items():
        assert task.name == name and torch.equal(task.prompt, bank[name].detach().to(dtype))
    assert found.tasks["tone"].template == Template("{text} =>")
    assert found.tasks["talk"].template == Template("{question}", chat=True, system="so")
    assert found.tasks["größe.2"].template is None
    assert bank.base is not None and found.base is not None
    assert (found.base.ids, found.base.fingerprint) == (bank.base.ids, bank.base.fingerprint)


def change(saved: Path, **values: Any) -> None:
    path = saved / "soft_prompts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def test_format_1_had_no_templates(saved: Path) -> None:
    entries = json.loads((saved / "soft_prompts.json").read_text())["tasks"]
    change(saved, format_version=1, tasks=[{k: v for k, v in each.items() if k != "template"} for each in entries])
    assert read_saved_prompts(saved, torch.float32).tasks["tone"].template is None


def test_prompts_without_a_base(saved: Path) -> None:
    change(saved, base_model=None)
    assert read_saved_prompts(saved, torch.float32).base is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"format_version": 3}, "format version 3"),
        ({"format_version": None}, "format version None"),
        ({"tensors": "../other.safetensors"}, "outside its folder"),
        ({"tensors": ""}, "outside its folder or no file"),
        ({"tensors": None}, "outside its folder or no file"),
        ({"tensors": "a\0.safetensors"}, "outside its folder or no file"),
        ({"tensors": "\ud800.safetensors"}, "outside its folder or no file"),
        ({"tensors": "other.safetensors"}, "is missing"),
        ({"sha256": "0" * 64}, "not the file that the index was written with"),
        ({"hidden_size": 31}, "float32"),
        ({"hidden_size": "32"}, "'hidden_size' must be of type int"),
        ({"tasks": []}, "no task"),
        ({"tasks": [3]}, "a task must be an object"),
        ({"tasks": [{"task": "nobody", "length": 3}]}, "no prompt of the task 'nobody'"),
        ({"tasks": [{"task": "tone", "length": 3}] * 2}, "one twice"),
        ({"tasks": [{"task": "tone", "length": 2}]}, "float32"),
        ({"tasks": [{"task": "tone", "length": 3, "template": {"text": "{a!r}", "chat": False}}]}, "plain|only hold"),
        ({"tasks": [{"task": "tone", "length": 3, "template": {"text": "{a}"}}]}, "'chat' must be of type bool"),
        ({"base_model": {"name": "x", "ids": [], "fingerprint": []}}, "must have ids"),
        ({"base_model": {"name": "x", "ids": [], "fingerprint": [0.1]}}, "must have ids"),
        ({"base_model": {"name": "x", "ids": [1, 2], "fingerprint": [0.1]}}, "must have ids"),
        ({"base_model": {"name": "x", "ids": [1], "fingerprint": [None]}}, "must have ids"),
    ],
)
def test_a_damaged_index_is_refused(saved: Path, values: dict[str, Any], told: str) -> None:
    change(saved, **values)
    with pytest.raises(SoftPromptError, match=told):
        read_saved_prompts(saved, torch.float32)


def test_a_file_that_is_not_whole_is_refused(saved: Path) -> None:
    path = next(saved.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SoftPromptError, match="not the file that the index was written with"):
        read_saved_prompts(saved, torch.float32)
    (saved / "soft_prompts.json").write_text("{")
    with pytest.raises(SoftPromptError, match="give the folder of a save"):
        read_saved_prompts(saved, torch.float32)


def test_a_prompt_that_is_not_finite_in_the_dtype_of_the_engine_is_refused(saved: Path) -> None:
    path = saved / "soft_prompts-large.safetensors"
    save_file({"prompt:tone": torch.full((3, 32), 1e30)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change(saved, tensors=path.name, sha256=digest, tasks=[{"task": "tone", "length": 3}])
    assert read_saved_prompts(saved, torch.bfloat16).tasks["tone"].length == 3
    with pytest.raises(SoftPromptError, match=r"'tone' is not finite in torch\.float16"):
        read_saved_prompts(saved, torch.float16)


def test_a_save_beside_the_reader_is_read_whole(saved: Path, bank: SoftPrompts, monkeypatch) -> None:
    """Between its index and its tensors the folder becomes another one: the reader starts again."""
    read, changed = Path.read_bytes, bank.subset(["tone"])
    with torch.no_grad():
        changed["tone"].fill_(0.25)

    def reading(path: Path) -> bytes:
        data = read(path)
        if path.name == "soft_prompts.json" and len(list(saved.glob("*.json"))) and not seen:
            seen.append(path)
            changed.save_pretrained(saved)
        return data

    seen: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", reading)
    found = read_saved_prompts(saved, torch.float32)
    assert list(found.tasks) == ["tone"] and bool((found.tasks["tone"].prompt == 0.25).all())

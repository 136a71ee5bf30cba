"""Tests of the folder that tasks come from."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from softprompt_vllm.base_model import ServedModel
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.task_folder import TaskFolder

from lightning_softprompt import SoftPrompts


def test_a_folder_of_saved_prompts(saved: Path, served: ServedModel) -> None:
    folder = TaskFolder(saved, served)
    assert not folder.is_export and list(folder.read()) == ["tone", "größe.2", "talk"]


def test_an_export_is_the_served_model_itself(tmp_path: Path, served: ServedModel) -> None:
    shutil.copytree(str(served.folder), tmp_path / "export")
    (tmp_path / "export" / "virtual_tokens.json").write_text(json.dumps({"start": [], "tasks": {"tone": [60]}}))
    model = replace(served, folder=tmp_path / "export", takes_embeddings=False)
    for given in (None, tmp_path / "export", tmp_path / "export" / ".." / "export"):
        folder = TaskFolder(given, model)
        assert folder.is_export and folder.read()["tone"].prompt == (60,)
    # Its virtual tokens are in the weights that the engine has loaded.
    (tmp_path / "export" / "virtual_tokens.json").write_text(json.dumps({"start": [], "tasks": {"new": [60]}}))
    assert not folder.has_changed()
    with pytest.raises(SoftPromptError, match="serve the folder itself as the model"):
        TaskFolder(tmp_path / "export", served).read()
    with pytest.raises(SoftPromptError, match="from 0 to 59"):
        TaskFolder(None, replace(model, vocabulary=60)).read()


def test_a_folder_that_is_neither(tmp_path: Path, served: ServedModel) -> None:
    with pytest.raises(SoftPromptError, match=r"nothing has neither soft_prompts\.json nor virtual_tokens\.json"):
        TaskFolder(tmp_path / "nothing", served)
    for model in (served, replace(served, folder=None)):
        with pytest.raises(SoftPromptError, match="SOFTPROMPT_FOLDER is not set, and the served model has neither"):
            TaskFolder(None, model)


def test_prompts_that_the_model_cannot_take(saved: Path, served: ServedModel) -> None:
    with pytest.raises(SoftPromptError, match="start vLLM with --enable-prompt-embeds"):
        TaskFolder(saved, replace(served, takes_embeddings=False)).read()
    with pytest.raises(SoftPromptError, match="have width 32, tiny has 64"):
        TaskFolder(saved, replace(served, hidden_size=64)).read()
    index = json.loads((saved / "soft_prompts.json").read_text())
    index["base_model"]["fingerprint"].reverse()
    (saved / "soft_prompts.json").write_text(json.dumps(index))
    with pytest.raises(SoftPromptError, match="another base model"):
        TaskFolder(saved, served).read()


def test_a_save_is_a_change_until_it_is_read(saved: Path, served: ServedModel, bank: SoftPrompts) -> None:
    folder = TaskFolder(saved, served)
    assert folder.has_changed()
    folder.read()
    assert not folder.has_changed()
    bank.subset(["tone"]).save_pretrained(saved)
    assert folder.has_changed() and list(folder.read()) == ["tone"] and not folder.has_changed()


def test_what_could_not_be_read_is_read_again(saved: Path, served: ServedModel) -> None:
    """As a copy that is under way has an index before it has what the index names."""
    folder = TaskFolder(saved, served)
    folder.read()
    tensors = next(saved.glob("*.safetensors"))
    tensors.rename(saved / "late")
    os.utime(saved / "soft_prompts.json")
    for _ in range(2):
        assert folder.has_changed()
        with pytest.raises(SoftPromptError, match="is missing"):
            folder.read()
    (saved / "late").rename(tensors)
    assert folder.has_changed() and len(folder.read()) == 3


def test_a_save_while_the_folder_is_read_is_read_next(saved: Path, served: ServedModel, bank, monkeypatch) -> None:
    folder = TaskFolder(saved, served)
    read = folder._read_prompts

    def reading() -> dict:
        found = read()
        bank.subset(["tone"]).save_pretrained(saved)
        return found

    monkeypatch.setattr(folder, "_read_prompts", reading)
    assert len(folder.read()) == 3
    assert folder.has_changed()

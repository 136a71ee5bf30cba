"""The tasks in a folder: read again when it changes, kept as they were when it cannot be read."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from lightning_softprompt import SoftPrompts
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.index import INDEX_NAME
from lightning_softprompt.serving.tasks import TaskFolder
from tests import tiny
from tests.inference.tasks import TEMPLATES, words
from tests.serving.helpers import RAGGED, prompts_of, save


def folder_of(path, **options) -> TaskFolder:
    return TaskFolder(tiny.tiny_model(), words(), path, "base", **options)


def test_what_changed_is_read_again_and_a_state_stays_what_it_was(tmp_path) -> None:
    save(tmp_path, RAGGED)
    folder = folder_of(tmp_path)
    first = folder.current
    assert first.names == ("base", *RAGGED) and not folder.refresh() and folder.current is first
    save(tmp_path, {**RAGGED, "task1": [40], "new": [9, 9]}, {"new": TEMPLATES["long"]})
    assert folder.refresh() and not folder.refresh()
    second = folder.current
    assert second.names == ("base", *RAGGED, "new") and second.reader.template("new") == TEMPLATES["long"]
    assert not torch.equal(first.prompts["task1"], second.prompts["task1"]) and "new" not in first.prompts
    assert first.created == pytest.approx(os.stat(tmp_path / INDEX_NAME).st_mtime, abs=60)


def test_what_cannot_be_served_is_said_and_the_earlier_state_stays(tmp_path, caplog) -> None:
    save(tmp_path, RAGGED)
    folder = folder_of(tmp_path)
    first = folder.current
    whole = (tmp_path / INDEX_NAME).read_bytes()
    for broken, said in ((b"{", "truncated or not JSON"), (None, "holds no saved prompts")):
        if broken is None:
            (tmp_path / INDEX_NAME).unlink()
        else:
            (tmp_path / INDEX_NAME).write_bytes(broken)
        assert not folder.refresh() and folder.current is first
        assert said in (folder.error or "") and said in caplog.text
    SoftPrompts(hidden_size=16).save_pretrained(tmp_path)  # of another base
    assert not folder.refresh() and folder.error
    (tmp_path / INDEX_NAME).write_bytes(whole)
    save(tmp_path, RAGGED)
    assert folder.refresh() and folder.error is None


def test_a_folder_whose_tensors_come_after_its_index_is_served_when_it_is_whole(tmp_path, caplog) -> None:
    save(tmp_path / "served", RAGGED)
    save(tmp_path / "new", {"fresh": [5, 6]})
    folder = folder_of(tmp_path / "served")
    shutil.copy(tmp_path / "new" / INDEX_NAME, tmp_path / "served")
    for _ in range(3):
        assert not folder.refresh() and "is missing, though" in (folder.error or "")
    assert caplog.text.count("cannot be served") == 1
    for path in (tmp_path / "new").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "served")
    assert folder.refresh() and folder.current.names == ("base", "fresh") and folder.error is None
    assert not folder.refresh()


def test_no_task_has_the_name_of_the_base(tmp_path) -> None:
    save(tmp_path, {"base": [5]})
    with pytest.raises(SoftPromptError, match=r"has a task 'base', and the base has this name, too.*--name"):
        folder_of(tmp_path)


def test_raw_takes_no_template(tmp_path) -> None:
    save(tmp_path, {"long": [5]}, {"long": TEMPLATES["long"]})
    assert folder_of(tmp_path).current.reader.template("long")
    assert folder_of(tmp_path, raw=True).current.reader.template("long") is None


def test_a_checkpoint_serves_as_a_folder_does(tmp_path) -> None:
    prompts = prompts_of(RAGGED)
    module = torch.nn.Module()
    module.soft_prompts = prompts
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": module.state_dict()}, path)
    folder = folder_of(path)
    assert set(folder.current.prompts.tasks) == set(RAGGED)
    module.soft_prompts = prompts_of({"other": [5, 6, 7, 8, 9, 10, 11, 12, 13]})
    torch.save({"state_dict": module.state_dict(), "more": [1] * 100}, path)
    assert folder.refresh() and folder.current.names == ("base", "other")

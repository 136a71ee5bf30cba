"""Tests of the tasks of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.tasks import Task
from softprompt_vllm.virtual_tokens import read_virtual_tokens


def written(folder: Path, content: Any) -> Path:
    (folder / "virtual_tokens.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_task_is_its_virtual_tokens_then_the_start_of_a_text(tmp_path: Path) -> None:
    content = {"format": 1, "first": 61, "start": [1], "tasks": {"tone": [61, 62], "größe": [63]}, "size": 128}
    found = read_virtual_tokens(written(tmp_path, content), vocabulary=128)
    assert found == {"tone": Task("tone", (61, 62, 1)), "größe": Task("größe", (63, 1))}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"start": []},
        {"start": [], "tasks": {}},
        {"start": [], "tasks": {"tone": []}},
        {"start": [], "tasks": {"tone": [128]}},
        {"start": [], "tasks": {"tone": [-1]}},
        {"start": [True], "tasks": {"tone": [61]}},
        {"start": None, "tasks": {"tone": [61]}},
        {"start": [], "tasks": {"tone": "61"}},
    ],
)
def test_what_is_no_such_index_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(SoftPromptError, match="export the model again"):
        read_virtual_tokens(written(tmp_path, content), vocabulary=128)


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "virtual_tokens.json").write_text('{"tasks": {"tone": [61')
    with pytest.raises(SoftPromptError, match="cannot be read"):
        read_virtual_tokens(tmp_path, vocabulary=128)

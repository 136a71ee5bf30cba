"""The pages to look things up in say what the code says: its errors, its files and its keys."""

from __future__ import annotations

import ast
import inspect
import json
import re
from dataclasses import fields

import pytest

from lightning_softprompt import (
    CausalLMModule,
    PromptDistillation,
    SoftPromptCallback,
    SoftPrompts,
    Source,
    TaskDataModule,
    TaskTemplate,
)
from tests import tiny
from tests.integration.pages import ROOT


def table_cells(page: str, column: int) -> list[str]:
    """What stands in backticks in a column of the tables of a page."""
    rows = re.findall(r"^\| *(`.*) *\|$", (ROOT / page).read_text(), re.MULTILINE)
    return [each for row in rows for each in re.findall(r"`([^`]+)`", row.split(" | ")[column])]


# ---------------------------------------------------------------- errors


def said(node: ast.expr) -> str:
    """The text of an expression, with … for what is not known before it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(map(said, node.values)) if isinstance(node, ast.JoinedStr) else "…"


def all_texts() -> list[str]:
    """The texts of the library's sources."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "lightning_softprompt").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)]
    return [said(node) for node in nodes]


def is_said(message: str, texts: list[str]) -> bool:
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    return any(re.search(pattern, text, re.DOTALL) for text in texts)


def test_the_page_of_errors_quotes_errors_that_there_are() -> None:
    texts, messages = all_texts(), table_cells("docs/errors.md", 0)
    assert len(messages) > 30
    assert [message for message in messages if not is_said(message, texts)] == []
    assert not is_said("there are … tasks and nobody says which row is which", texts)


# ---------------------------------------------------------------- files


def test_the_page_of_files_has_the_files_and_keys_of_a_save(tmp_path) -> None:
    model = tiny.tiny_model("llama")
    prompts = SoftPrompts.for_model(model, {"tone": 3})
    prompts.templates["tone"] = TaskTemplate(labels=[" good", " bad"])
    prompts.save_pretrained(tmp_path)
    named = set(table_cells("docs/files.md", 0)) | set(table_cells("docs/files.md", 1))
    for path in tmp_path.iterdir():
        assert re.sub(r"-\w+\.", "-<hash>.", path.name) in named, path.name
    index = json.loads((tmp_path / "soft_prompts.json").read_text())
    assert {*index, *index["base_model"], *index["tasks"][0]} <= named
    page = (ROOT / "docs" / "files.md").read_text()
    template = re.search(r"A `template` has .*?: (.*?)\.\n", page, re.DOTALL)[1]
    assert re.findall(r"`(\w+)`", template) == [field.name for field in fields(TaskTemplate)]


# ---------------------------------------------------------------- keys of a config


@pytest.mark.parametrize(
    ("key", "classes"),
    [
        ("prompts", [SoftPromptCallback]),
        ("model", [CausalLMModule, PromptDistillation]),
        ("data", [TaskDataModule]),
    ],
)
def test_the_page_of_the_config_has_all_keys(key: str, classes: list[type]) -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    (row,) = re.findall(rf"^\| `{key}` \|.*$", page, re.MULTILINE)
    expected = {name for each in classes for name in inspect.signature(each).parameters}
    assert set(re.findall(r"`(\w+)`", row.split(" | ")[-1])) == expected


def test_the_page_of_the_config_has_all_keys_of_a_source() -> None:
    (named,) = re.findall(r"^(.*) are the keys of a source\.$", (ROOT / "docs" / "config.md").read_text(), re.MULTILINE)
    assert re.findall(r"`(\w+)`", named) == [field.name for field in fields(Source)]

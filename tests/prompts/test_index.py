"""The index of a folder: both formats, and nothing in it is believed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_softprompt import SoftPromptError, TaskTemplate
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.prompts.characters import has_control
from lightning_softprompt.prompts.index import Entry, Index, read_index, template_of, written_index

PATH = Path("prompts/soft_prompts.json")
TEMPLATE = TaskTemplate(
    "{text}\n\tTone:", " {tone}", [" good", " bad"], chat=True, system="Be\r\nbrief.", end_token=False
)
INDEX = Index(
    4,
    BaseModel("some/base", 4, (0, 3), (0.5, -1.0)),
    [Entry("情感", 3, "Tokens(ids=[5])", True, TEMPLATE), Entry("b", 2, "a tensor", False)],
    "soft_prompts-abc.safetensors",
    "abc",
)
CONTENT = json.loads(written_index(INDEX))


def read(content: Any) -> Index:
    return read_index(json.dumps(content).encode(), PATH)


def test_what_is_written_is_read() -> None:
    assert read_index(written_index(INDEX), PATH) == INDEX
    assert CONTENT["format_version"] == 2 and CONTENT["tasks"][1]["template"] is None
    without_base = Index(4, None, [], "x.safetensors", "")
    assert read_index(written_index(without_base), PATH) == without_base


def test_the_first_format_has_no_templates() -> None:
    first = copy.deepcopy(CONTENT)
    first["format_version"] = 1
    with pytest.raises(SoftPromptError, match="must have the fields task, length, start, frozen, found"):
        read(first)
    for task in first["tasks"]:
        del task["template"]
    found = read(first)
    assert [entry.template for entry in found.entries] == [None, None] and found.base == INDEX.base
    first["format_version"] = 2
    with pytest.raises(SoftPromptError, match="must have the fields task, length, start, frozen, template"):
        read(first)


CONTROL = "x\x1b]0;title\x07"
WRONG = [
    (["format_version"], True, "format version True"),
    (["format_version"], 3, "format version 3"),
    (["format_version"], CONTROL, "format version"),
    (["library_version"], CONTROL, "'library_version' must not hold control characters"),
    (["library_version"], None, "'library_version' must be a str"),
    (["tensors"], f"{CONTROL}.safetensors", "'tensors' must not hold control characters"),
    (["tensors"], "a/b.safetensors", "outside its folder"),
    (["tensors"], "..\\b.safetensors", "outside its folder"),
    (["tensors"], ["a"], "'tensors' must be a str"),
    (["sha256"], CONTROL, "'sha256' must not hold control"),
    (["hidden_size"], True, "'hidden_size' must be a int, found True"),
    (["hidden_size"], 0, "'hidden_size' must be at least 1, found 0"),
    (["hidden_size"], "4", "'hidden_size' must be a int"),
    (["tasks"], {}, "'tasks' must be a list"),
    (["tasks", 0], "a", "each task must have the fields"),
    (["tasks", 0, CONTROL], 1, "each task must have the fields"),
    (["tasks", 0, "task"], CONTROL, "no control characters"),
    (["tasks", 0, "task"], 5, "non-empty text, got 5"),
    (["tasks", 0, "task"], "b", "holds a task twice"),
    (["tasks", 0, "length"], 10**40, "'length' must be at least 1, found 1000"),
    (["tasks", 0, "length"], True, "'length' must be a int"),
    (["tasks", 0, "start"], "two\nlines", "'start' must not hold control characters"),
    (["tasks", 0, "start"], None, "'start' must be a str"),
    (["tasks", 0, "frozen"], 1, "'frozen' must be a bool"),
    (["tasks", 0, "template"], "text", "the template of task '情感' must have the fields text, target"),
    (["tasks", 0, "template", "more"], 1, "must have the fields text, target"),
    (["tasks", 0, "template", "text"], None, "'text' of the template must be a text, got None"),
    (["tasks", 0, "template", "text"], "{0.__class__}", "may only hold {column} fields"),
    (["tasks", 0, "template", "text"], "{text:>999999999}", "may only hold {column} fields"),
    (["tasks", 0, "template", "text"], "{text!r}", "may only hold {column} fields"),
    (["tasks", 0, "template", "text"], "{}", "may only hold {column} fields"),
    (["tasks", 0, "template", "text"], "{text", "unbalanced braces"),
    (["tasks", 0, "template", "text"], CONTROL, "may only hold newlines"),
    (["tasks", 0, "template", "target"], "\x9b2J", "may only hold newlines"),
    (["tasks", 0, "template", "labels"], ["a", "\x1bc"], "may only hold newlines"),
    (["tasks", 0, "template", "labels"], "ab", "'labels' of the template must be a list of texts"),
    (["tasks", 0, "template", "labels"], ["a", 1], "the labels of the template must be texts"),
    (["tasks", 0, "template", "labels"], [["a"], ["b"]], "the labels of the template must be texts"),
    (["tasks", 0, "template", "labels"], ["a"], "at least two different texts"),
    (["tasks", 0, "template", "chat"], "no", "'chat' of the template must be true or false"),
    (["tasks", 0, "template", "chat"], False, "is no chat"),
    (["tasks", 0, "template", "system"], 5, "'system' of the template must be a text or None"),
    (["tasks", 0, "template", "system"], "\x00", "may only hold newlines"),
    (["tasks", 0, "template", "end_token"], 0, "'end_token' of the template must be true, false or None"),
    (["base_model"], "some/base", "'base_model' must have the fields name"),
    (["base_model", "name"], CONTROL, "'name' must not hold control characters"),
    (["base_model", "name"], None, "'name' must be a str"),
    (["base_model", "hidden_size"], "4", "'hidden_size' must be a int"),
    (["base_model", "ids"], [-1], "must hold numbers"),
    (["base_model", "ids"], [True], "must hold numbers"),
    (["base_model", "ids"], 5, "'ids' must be a list"),
    (["base_model", "fingerprint"], ["1"], "must hold numbers"),
    (["base_model", "fingerprint"], [float("nan")], "must hold numbers"),
    (["base_model", "fingerprint"], [10**400], "must hold numbers"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG, ids=str)
def test_each_field_is_checked(place: list[Any], value: object, message: str) -> None:
    content: Any = copy.deepcopy(CONTENT)
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(SoftPromptError) as caught:
        read(content)
    assert message in str(caught.value) and str(caught.value).startswith(str(PATH))
    assert not has_control(str(caught.value)) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"format_version": 2'], ids=lambda d: str(d[:5])
)
def test_what_is_not_json_is_one_line(data: bytes) -> None:
    with pytest.raises(SoftPromptError, match=r"soft_prompts\.json is truncated or not JSON"):
        read_index(data, PATH)


def test_a_template_is_read_by_itself() -> None:
    assert template_of(CONTENT["tasks"][0]["template"], "a", PATH) == TEMPLATE
    with pytest.raises(SoftPromptError, match=r"soft_prompts\.json is damaged: the template of task 'a'"):
        template_of(None, "a", PATH)

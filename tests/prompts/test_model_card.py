"""The model card: what it says, that the Hub can read it, and that nothing in names and templates breaks it."""

from __future__ import annotations

import ast
import re
import shlex
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from lightning_softprompt import SoftPrompts, TaskTemplate
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.prompts.index import Entry
from lightning_softprompt.prompts.model_card import (
    MARKER,
    is_card,
    looks_like_hub_id,
    may_replace,
    model_card,
    request_text,
)

BASE = BaseModel("some/base", 4, (0,), (0.5,))
HOSTILE = [
    "a|b",
    "---",
    "`code` ``` ~~~",
    "*bold* _it_ <script>alert(1)</script> <!-- -->",
    "[link](https://example.org) https://example.org www.example.org @user :smile: $x$ #1 &lt; ~~s~~",
    "back\\slash \\| \\",
    "quote \" and ' two",
    "\u202eright to left",
    MARKER,
]


def parts(card: str) -> tuple[dict[str, Any], list[Any]]:
    """The front matter, and the tokens of the rest."""
    front, _, rest = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(front), MarkdownIt("commonmark").enable("table").parse(rest)


def cells(tokens: list[Any]) -> list[list[str]]:
    """The rows of the table as they are read on the page: no cell may hold anything but text."""
    rows: list[list[str]] = []
    for place, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            inline = tokens[place + 1]
            assert {child.type for child in inline.children} <= {"text", "text_special"}, inline.content
            rows[-1].append("".join(child.content for child in inline.children))
    return rows


def blocks(tokens: list[Any]) -> dict[str, str]:
    return {token.info: token.content for token in tokens if token.type == "fence"}


def test_it_says_where_the_system_says_nothing() -> None:
    assert request_text(TaskTemplate("{x}", chat=True, system="")).endswith(
        " in a chat, in which the system says nothing"
    )


def test_the_card_tells_the_tasks_and_how_to_answer() -> None:
    labels = TaskTemplate("{title}\n=> {text}:", " {tone}", [" good", " bad"])
    chat = TaskTemplate("{question}", chat=True, system="Be brief.")
    entries = [Entry("tone", 8, "", False, labels), Entry("chat", 3, "", False, chat), Entry("raw", 2, "", False)]
    card = model_card(entries, BASE, "my prompts")
    front, tokens = parts(card)
    assert front == {
        "library_name": "lightning-softprompt",
        "tags": ["prompt-tuning", "soft-prompt"],
        "base_model": "some/base",
    }
    assert cells(tokens) == [
        ["task", "virtual tokens", "text", "answer"],
        ["tone", "8", '"{title}\\n=> {text}:"', '" good", " bad"'],
        ["chat", "3", '"{question}" in a chat, behind "Be brief."', "free text"],
        ["raw", "2", "none", "free text"],
    ]
    code = blocks(tokens)
    assert 'MixedTaskGenerator.from_pretrained("some/base", "my prompts")' in code["python"]
    assert 'answer([{"title": "…", "text": "…"}], tasks=["tone"])' in code["python"]
    words = shlex.split(code["bash"])
    assert words[:2] == ["lightning-softprompt", "generate"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--base"] == "some/base" and options["--prompts"] == "my prompts" and len(options) == 4
    assert card.rstrip().endswith(MARKER) and "[some/base](https://huggingface.co/some/base)" in card


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_breaks_the_card(hostile: str) -> None:
    template = TaskTemplate(f"{hostile}\n---\n```\n{{text}}", " {label}", [hostile, f"{hostile}\n|"])
    card = model_card([Entry(hostile, 3, "", False, template), Entry("next", 1, "", False)], BASE, f"x {hostile}")
    front, tokens = parts(card)
    assert front["base_model"] == "some/base"
    seen = hostile.replace("\u202e", "\\u202e")
    rows = cells(tokens)
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert not any(re.search(r"(?<!\\)[:.@$~]", line) for line in table)  # what only GitHub takes for markup
    assert [len(row) for row in rows] == [4, 4, 4] and rows[1][0] == seen and rows[2][0] == "next"
    quoted = seen.replace("\\", "\\\\").replace("\\\\u202e", "\\u202e").replace('"', '\\"')
    assert rows[1][2] == f'"{quoted}\\n---\\n```\\n{{text}}"' and rows[1][3] == f'"{quoted}", "{quoted}\\n|"'
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "bash"]
    call: Any = ast.parse(blocks(tokens)["python"]).body[-1]
    assert ast.literal_eval(call.value.keywords[0].value) == [hostile]
    assert ast.literal_eval(call.value.args[0]) == ["…"]
    words = shlex.split(blocks(tokens)["bash"])
    assert words[words.index("--prompts") + 1] == f"x {hostile}"
    assert is_card(card.encode())


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("gpt2", True),
        ("/models/smol", False),
        ("./models", False),
        ("../models", False),
        ("C:\\models", False),
        ("a/b/c", False),
        ("", False),
        ("a: b", False),
        ("a/b\n", False),
        ("here", False),
        ("runs/here", False),
    ],
)
def test_a_path_is_no_id_of_the_hub(name: str, is_id: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "runs" / "here").mkdir(parents=True)
    assert looks_like_hub_id(name) == is_id
    card = model_card([Entry("a", 1, "", False)], BaseModel(name, 4, (0,), (0.5,)), "prompts")
    front, tokens = parts(card)
    assert front.get("base_model") == (name if is_id else None)
    assert (f'("{name}", "prompts")' if is_id else '("BASE", "prompts")') in blocks(tokens)["python"]
    assert is_id or not name or name in ("here",) or name not in card


def test_the_card_is_written_with_every_save_but_never_over_the_users(tmp_path) -> None:
    prompts = SoftPrompts(4)
    prompts.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert is_card(card.read_bytes()) and "```" not in card.read_text()
    prompts.add("tone", torch.ones(2, 4))
    prompts.save_pretrained(tmp_path)
    assert re.search(r"^\| tone \| 2 \|", card.read_text(), re.MULTILINE)
    card.write_text("# My own words\n")
    prompts.save_pretrained(tmp_path)
    assert card.read_text() == "# My own words\n" and not may_replace(card)
    card.unlink()
    card.symlink_to(tmp_path / "gone")
    assert not may_replace(card)
    card.unlink()
    assert may_replace(card)
    card.mkdir()
    prompts.save_pretrained(tmp_path)
    assert card.is_dir() and SoftPrompts.from_pretrained(tmp_path).tasks == ("tone",)

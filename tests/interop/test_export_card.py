"""The README of an export: requests for each engine, and what it costs."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from lightning_softprompt import TaskTemplate
from lightning_softprompt.interop.export_card import ExportedTask, export_card
from lightning_softprompt.prompts.characters import has_control
from tests.interop.bases import ODD


def card(prefix: str = "<|task:tone|>", start: str = "", template: TaskTemplate | None = None) -> str:
    tasks = {"raw": ExportedTask([7], "<|task:raw|>", None), ODD: ExportedTask([61, 62, 0], prefix, template)}
    return export_card("user/base", tasks, start, 52.4, 3 * 2**20)


def test_it_shows_a_request_for_every_engine_and_the_cost() -> None:
    text = card(template=TaskTemplate("{text}\nIt's:", " {label}"))
    for words in ("# user/base", "stood 52 above", "3 MiB of weights", "## transformers", "## vLLM", "## llama.cpp"):
        assert words in text
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(python, "README.md", "exec")
    assert "<|task:tone|>{text}\\nIt's:" in python
    lines = [
        shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    bodies = [json.loads(line[line.index("-d") + 1]) for line in lines if "-d" in line]
    assert bodies[0]["prompt"] == "<|task:tone|>{text}\nIt's:" and bodies[1]["chat_template_kwargs"] == {"task": ODD}
    assert bodies[2]["prompt"] == [61, 62, 0, "{text}\nIt's:"]
    assert '"content": "…"' in " ".join(lines[2]) and "ranks the labels" in text
    assert "written out" not in text and "written out" in card(start="<s>")


@pytest.mark.parametrize(
    "template", [None, TaskTemplate("{x}", chat=True), TaskTemplate("{x}", chat=True, system="|\n")]
)
def test_names_and_templates_break_no_table(template: TaskTemplate | None) -> None:
    text = card("<|soft1_0|>" * 40, template=template)
    assert not has_control(text, allowed="\n")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| task")]
    assert len(rows) == 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert max(map(len, rows)) < 300

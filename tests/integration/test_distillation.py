"""The page on distillation: its code and its command run."""

from __future__ import annotations

import pytest

from lightning_softprompt import SoftPrompts, cli
from tests.integration.pages import command_lines
from tests.integration.test_docs import run
from tests.training.distilled import save_chat_base, write

SYSTEM = "You are the support desk of a shop . Answer in one short friendly sentence and never name a price ."


@pytest.fixture
def base(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    asked = ("open", "price", "bike", "shop")
    rows = [{"text": f"{one} {other}"} for one in ("when", "where", "what") for other in asked]
    write(tmp_path / "texts.jsonl", rows[:10])
    write(tmp_path / "held_out.jsonl", rows[10:])
    (tmp_path / "teacher.txt").write_text(SYSTEM)
    return str(save_chat_base(tmp_path / "base", f"{SYSTEM} when where what open price bike shop"))


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page(base) -> None:
    names: dict = {"BASE": base, "SYSTEM": SYSTEM, "STEPS": 2}
    run("docs/distillation.md", names, 1)
    saved = SoftPrompts.from_pretrained("distilled")
    assert saved.tasks == ("support",) and saved.lengths == (8,) and saved.templates["support"].chat
    assert len(names["answers"]) == 1 and not names["answers"].failures


@pytest.mark.filterwarnings("ignore")
def test_the_command_of_the_page(base, capsys) -> None:
    (line,) = command_lines("docs/distillation.md")
    cli.main([{"MODEL": base}.get(word, word) for word in line[1:]] + ["--steps", "2", "--max_new_tokens", "4"])
    assert "support: 1 held-out texts" in capsys.readouterr().out
    assert SoftPrompts.from_pretrained("distilled").lengths == (16,)

"""Every command says in one line what is wrong, whatever it is given; `wrong_values.py` makes more of such calls."""

from __future__ import annotations

import random
from importlib import import_module

import pytest

from lightning_softprompt import SoftPrompts
from lightning_softprompt.cli.main import ROOMS
from tests.integration.wrong_values import World, judge, run


@pytest.mark.filterwarnings("ignore")
def test_wrong_values_end_in_one_line(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    wrong, ended = run(World(tmp_path, tiny_base), 60, seed=1)
    assert not wrong, "\n".join(wrong)
    assert ended["one line"] >= 40


def test_every_command_is_tried(tiny_base, tmp_path) -> None:
    draw, world = random.Random(0), World(tmp_path, tiny_base)
    assert {world.call(draw)[0] for _ in range(500)} == set(ROOMS) - {"completion"}


@pytest.mark.parametrize(
    "error, reason", [(KeyError("task"), "KeyError, a mistake of the library"), (RuntimeError("no room"), "")]
)
def test_a_mistake_of_the_library_is_found(error: Exception, reason: str, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(SoftPrompts, "from_pretrained", fail)
    assert judge(["inspect", "--prompts", "a"])[0] == reason
    monkeypatch.setattr(import_module("lightning_softprompt.cli.main"), "_said", fail)
    assert judge(["inspect", "--prompts", "a"])[0].startswith("a traceback: ")

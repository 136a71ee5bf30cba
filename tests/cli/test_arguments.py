"""Command lines as people write them."""

from __future__ import annotations

import pytest

from lightning_softprompt import SoftPrompts, Tokens
from lightning_softprompt.cli.arguments import flags_and_lists, with_values
from lightning_softprompt.cli.folders import merge
from lightning_softprompt.cli.inference import generate
from tests import tiny
from tests.cli.command_line import said


def test_the_options_of_a_function_tell_flags_and_lists() -> None:
    assert flags_and_lists(merge) == ({"--json"}, {"--folders"})
    assert flags_and_lists(generate) == ({"--chat", "--resume", "--json"}, set())


@pytest.mark.parametrize(
    "written, read",
    [
        (["--tasks", "tone"], ['--tasks=["tone"]']),
        (["--tasks=tone", "mood", "--json"], ['--tasks=["tone", "mood"]', "--json=true"]),
        (["--tasks", "[a, b]"], ["--tasks=[a, b]"]),
        (["--tasks", "no", "1", "a, b"], ['--tasks=["no", "1", "a, b"]']),
        (["--tasks", "--json", "false"], ["--tasks", "--json", "false"]),
        (["--length", "-3", "--json=false"], ["--length", "-3", "--json=false"]),
    ],
)
def test_lists_and_flags_are_read_as_they_are_meant(written: list[str], read: list[str]) -> None:
    assert with_values(written, {"--json"}, {"--tasks"}) == read


def test_plain_lists_reach_the_commands(tmp_path, capsys) -> None:
    odd = ["\U0001f600", "日本: é", "\"quoted\" 'twice'", "{a}, #b", "word " * 40 + "end", "~"]
    for name, tasks in (("a", ["no", "tone"]), ("b", ["1", *odd])):
        made = {task: Tokens([5]) for task in tasks}
        SoftPrompts.for_model(tiny.tiny_model(), made).save_pretrained(tmp_path / name)
    found = said(capsys, "merge", "--folders", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "all")
    assert found["tasks"] == ["no", "tone", "1", *odd]
    for task in odd:  # by itself, too
        said(capsys, "remove-task", "--prompts", tmp_path / "b", "--tasks", task)
    assert said(capsys, "remove-task", "--prompts", tmp_path / "all", "--tasks", "no", "1", *odd)["tasks"] == ["tone"]

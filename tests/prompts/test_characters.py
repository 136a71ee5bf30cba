"""Control characters are found, shown and never printed."""

from __future__ import annotations

import pytest

from lightning_softprompt.prompts.characters import has_control, is_control, shown, without_control


@pytest.mark.parametrize("character", ["\x00", "\x07", "\n", "\x1b", "\x7f", "\x85", "\x9b", "\ud800"])
def test_control_characters_are_known_and_shown_as_escape_sequences(character: str) -> None:
    assert is_control(character) and has_control(f"a{character}b") and not has_control(f"a{character}b", character)
    visible = without_control(f"a{character}b")
    assert not has_control(visible) and visible.startswith("a\\") and visible.endswith("b")
    assert not has_control(shown({"name": character}))


def test_other_characters_stay() -> None:
    text = "Größe 情感 \\ 'a' \"b\" 👩‍🚀"
    assert not has_control(text) and without_control(text) == text


def test_long_values_are_cut() -> None:
    assert len(shown("x" * 10_000)) < 250 and shown("x") == "'x'"

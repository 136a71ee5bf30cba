"""Texts to make a mask from and others to measure it on."""

from __future__ import annotations

from lightning_softprompt.interop.probe_texts import FITTED, HELD_OUT


def test_the_two_sets_share_no_text_and_hold_many_scripts() -> None:
    assert len({*FITTED, *HELD_OUT}) == len(FITTED) + len(HELD_OUT)
    for texts in (FITTED, HELD_OUT):
        scripts = "".join(texts)
        assert any("а" <= letter <= "я" for letter in scripts) and any("ぁ" <= letter <= "ん" for letter in scripts)
        assert "{" in scripts and any(letter.isdigit() for letter in scripts)

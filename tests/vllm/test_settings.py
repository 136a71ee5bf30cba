"""Tests of the settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.settings import Settings


def test_settings_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_FOLDER", "prompts")
    assert Settings.of_environment() == Settings(Path("prompts"), raw=False)
    assert Settings.of_environment({"SOFTPROMPT_FOLDER": "", "SOFTPROMPT_RAW": ""}) == Settings(None, raw=False)
    assert Settings.of_environment({"SOFTPROMPT_RAW": "1"}).raw


def test_a_switch_is_0_or_1() -> None:
    with pytest.raises(SoftPromptError, match="SOFTPROMPT_RAW must be 0 or 1, found 'yes'"):
        Settings.of_environment({"SOFTPROMPT_RAW": "yes"})

"""Tests of the versions of vLLM."""

from __future__ import annotations

import pytest
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.versions import check_version


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.1+cpu", "0.32.0rc1"])
def test_the_versions_that_it_was_run_against(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.3.2", "1.32.0", "dev", "0.320.0"])
def test_others_are_refused_by_name(version: str) -> None:
    with pytest.raises(SoftPromptError, match=rf"works with vLLM 0\.32, found {version}; install vllm>=0\.32,<0\.33"):
        check_version(version)

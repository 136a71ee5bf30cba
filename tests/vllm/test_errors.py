"""Tests of the error."""

from __future__ import annotations

from softprompt_vllm import SoftPromptError


def test_vllm_takes_it_for_a_mistake_of_the_client() -> None:
    # vLLM answers 400 to a ValueError, and 500 to an error that it does not know.
    assert issubclass(SoftPromptError, ValueError)

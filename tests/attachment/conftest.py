"""Fixtures of the tests of attached models."""

from __future__ import annotations

import pytest

from tests.attachment import helpers


@pytest.fixture(params=["auto", "never"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds for prompts as a prefix, where the batch allows it, and for prompts in the sequence."""
    monkeypatch.setattr(helpers, "PREFIX", request.param)
    return request.param


@pytest.fixture(params=["llama", "gpt2"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["left", "right"])
def side(request: pytest.FixtureRequest) -> str:
    return request.param

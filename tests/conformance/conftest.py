"""Fixtures of the tests of types of models."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["left", "right"])
def side(request: pytest.FixtureRequest) -> str:
    return request.param

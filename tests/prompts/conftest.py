"""The model that the tests of the prompts share."""

from __future__ import annotations

import pytest

from tests import tiny


@pytest.fixture
def model():
    return tiny.tiny_model("llama")

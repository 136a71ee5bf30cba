"""The tokenizer that the tests of the data share."""

from __future__ import annotations

import pytest

from tests.data.rows import WORDS
from tests.tokenizer import word_tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS)

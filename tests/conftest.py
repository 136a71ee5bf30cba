"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.tokenizer import word_tokenizer


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer, as a base model lies on a disk."""
    folder = tmp_path_factory.mktemp("base")
    words = ["good", "bad", "film", "news", "product", "positive", "negative", "a", "the", "and", "of", "is", "it"]
    words += ["so", "text", "=>", "?", ".", "Decide", "whether", "or"]
    tiny.tiny_model("llama").save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder

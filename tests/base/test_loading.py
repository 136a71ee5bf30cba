"""Base models and tokenizers from a folder, and what is said where there are none."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError
from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
from tests import tiny


def test_what_was_saved_is_loaded_with_the_options_of_transformers(tiny_base) -> None:
    saved = tiny.tiny_model("llama").state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        found = load_causal_lm(str(tiny_base), dtype=dtype).state_dict()
        assert found.keys() == saved.keys()
        for name, value in saved.items():
            assert found[name].dtype == dtype
            torch.testing.assert_close(found[name], value.to(dtype))
    tokenizer = load_tokenizer(tiny_base)
    assert tokenizer("good bad")["input_ids"] == [4, 5]  # the first words, behind four special tokens


@pytest.mark.parametrize("load, what", [(load_causal_lm, "causal LM"), (load_tokenizer, "tokenizer")])
def test_what_is_not_there_is_named(load, what: str, tmp_path) -> None:
    missing = tmp_path / "gone"
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (missing, empty):
        with pytest.raises(SoftPromptError, match=f"no {what} could be loaded from '{path}'; give the id of") as caught:
            load(path)
        assert isinstance(caught.value.__cause__, OSError | ValueError)

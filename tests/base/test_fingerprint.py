"""A base model is known again by its embedding, whatever its name, its dtype and the end of its vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_softprompt import SoftPromptError
from lightning_softprompt.base.fingerprint import BaseModel
from tests import tiny


def test_a_fingerprint_is_the_beginning_of_some_embeddings() -> None:
    model = tiny.tiny_model()
    model.config._name_or_path = "some/base"
    found = BaseModel.of(model)
    table = model.get_input_embeddings().weight.detach()
    assert (found.name, found.hidden_size, found.ids) == ("some/base", 32, tuple(range(0, 46, 3)))  # 61 ids, 16 of them
    expected = [float(table[id, column]) for id in found.ids for column in range(8)]
    assert found.fingerprint == pytest.approx(expected, rel=1e-4)
    assert BaseModel.of(model, ids=(60,)).fingerprint == pytest.approx(table[60, :8].tolist(), rel=1e-4)


def test_another_name_another_dtype_and_more_ids_are_the_same_model() -> None:
    known = BaseModel.of(tiny.tiny_model())
    other = tiny.tiny_model().bfloat16()
    other.config._name_or_path = "copied/to/here"
    other.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    known.check(other)
    assert known.is_same(BaseModel.of(other, known.ids))
    with torch.no_grad():
        other.get_input_embeddings().weight[:, :8] *= 1.2
    with pytest.raises(SoftPromptError, match="the embeddings differ"):
        known.check(other)


def test_other_weights_and_too_small_a_vocabulary_are_another_model() -> None:
    known = BaseModel.of(tiny.tiny_model())
    with pytest.raises(SoftPromptError, match=r"another base model \(without a name, width 32\) than LlamaForCausalLM"):
        known.check(tiny.tiny_model(seed=1))
    small = tiny.tiny_model()
    small.resize_token_embeddings(20)
    small.config._name_or_path = "some/base"
    with pytest.raises(SoftPromptError, match="than some/base: the embeddings differ"):
        known.check(small)


def test_a_model_with_several_input_embeddings_is_refused(monkeypatch) -> None:
    model = tiny.tiny_model()
    monkeypatch.setattr(model, "get_input_embeddings", lambda: nn.ModuleList([nn.Embedding(3, 4), nn.Embedding(3, 4)]))
    with pytest.raises(SoftPromptError, match="has not one input embedding, but ModuleList"):
        BaseModel.of(model)

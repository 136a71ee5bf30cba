"""Tests of whether a served model is the one that prompts were trained for."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from softprompt_vllm.base_model import BaseModel, ServedModel
from softprompt_vllm.errors import SoftPromptError
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from lightning_softprompt.base.fingerprint import BaseModel as Remembered
from tests import tiny


def remembered(model: PreTrainedModel) -> BaseModel:
    """What a folder of prompts holds of `model`."""
    found = Remembered.of(model)
    return BaseModel("trained", found.ids, found.fingerprint)


def saved(model: PreTrainedModel, folder: Path) -> ServedModel:
    model.save_pretrained(folder)
    return ServedModel("served", folder, model.config.hidden_size, model.config.vocab_size, torch.float32, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_in_any_dtype_are_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = remembered(tiny.tiny_model())
    base.check(saved(tiny.tiny_model().to(dtype), tmp_path))


def test_other_weights_are_not(tmp_path: Path) -> None:
    base = remembered(tiny.tiny_model())
    with pytest.raises(SoftPromptError, match=r"another base model \(trained\) than served"):
        base.check(saved(tiny.tiny_model(seed=1), tmp_path))


def test_the_same_embedding_with_two_ids_swapped_is_not(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    base = remembered(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = model.get_input_embeddings().weight.roll(1, 0)
    with pytest.raises(SoftPromptError, match="the embeddings differ"):
        base.check(saved(model, tmp_path))


def test_a_model_that_scales_its_embedding_inside_is_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8)
    model = Gemma2ForCausalLM(Gemma2Config(num_attention_heads=4, num_key_value_heads=2, **sizes))
    base = remembered(model)
    assert base.fingerprint[8] != pytest.approx(model.get_input_embeddings().weight[base.ids[1], 0].item(), rel=0.5)
    base.check(saved(model, tmp_path))


def test_files_without_an_embedding_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, model = remembered(tiny.tiny_model()), saved(tiny.tiny_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: each for name, each in load_file(path).items() if each.shape[0] != tiny.VOCABULARY}
    save_file(tensors, path)
    (tmp_path / "more.safetensors").write_bytes(b"not one")
    for each in (model, replace(model, folder=None)):
        with caplog.at_level(logging.WARNING):
            base.check(each)
        assert "nobody checked that the prompts were trained for it" in caplog.text
        caplog.clear()

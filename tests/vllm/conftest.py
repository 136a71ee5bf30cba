"""Saved prompts of a tiny model, and stand-ins for the few names of vLLM that `serving.py` imports.

`make test-vllm` runs the same code on the real server; these tests run where there is no vLLM.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from softprompt_vllm.base_model import ServedModel

from lightning_softprompt import SoftPrompts, TaskTemplate
from tests import tiny


class LoRARequest:
    """As vLLM's: named fields."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`softprompt_vllm.serving`, imported beside stand-ins."""
    engine = SimpleNamespace(
        tokens_input=lambda ids, **kept: {"type": "token", "prompt_token_ids": ids, **kept},
        embeds_input=lambda embeds, **kept: {"type": "embeds", "prompt_embeds": embeds, **kept},
    )
    for name in ("vllm", "vllm.inputs", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.inputs.engine", engine)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=LoRARequest))
    monkeypatch.delitem(sys.modules, "softprompt_vllm.serving", raising=False)
    yield importlib.import_module("softprompt_vllm.serving")
    sys.modules.pop("softprompt_vllm.serving", None)


@pytest.fixture(scope="session")
def bank() -> SoftPrompts:
    """Three tasks of the tiny model, two of them with templates."""
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"tone": 3, "größe.2": 5, "talk": 2}, seed=1)
    prompts.templates["tone"] = TaskTemplate("{text} =>", " {label}", labels=[" good", " bad"])
    prompts.templates["talk"] = TaskTemplate("{question}", "{answer}", chat=True, system="so")
    return prompts


@pytest.fixture
def saved(bank: SoftPrompts, tmp_path: Path) -> Path:
    """The folder that `save_pretrained` writes."""
    bank.save_pretrained(tmp_path / "prompts")
    return tmp_path / "prompts"


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """The tiny model, as the plugin sees it."""
    folder = tmp_path_factory.mktemp("served")
    tiny.tiny_model().save_pretrained(folder)
    return ServedModel("tiny", folder, 32, tiny.VOCABULARY, torch.float32, takes_embeddings=True)

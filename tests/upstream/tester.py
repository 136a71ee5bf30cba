"""What transformers' common tests ask about a model: a tiny config of its type, and inputs."""

from __future__ import annotations

import random
import unittest
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.conformance import models

MASKS = ("ones", "random")


class ModelTester:
    """The `model_tester` of a test case.

    Args:
        model_type: as in transformers' configs.
        mask: one of `MASKS`: every column of every row is text, or about half of them, anywhere.
        common: the module of the common tests.
    """

    batch_size = 3
    seq_length = 7
    is_training = True

    def __init__(self, model_type: str, mask: str, common: ModuleType) -> None:
        self.model_type = model_type
        self.mask = mask
        self.common = common
        self.config_class = type(self.get_config())
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if hasattr(self.get_config(), name):
                setattr(self, name, getattr(self.get_config(), name))

    def get_config(self) -> PreTrainedConfig:
        """A new one at each call, as tests write into it."""
        return models.tiny_config(self.model_type)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        """The config, and the arguments of a forward pass."""
        config, shape = self.get_config(), (self.batch_size, self.seq_length)
        # Without the special ids, which stand in front.
        ids = self.common.ids_tensor(shape, config.vocab_size - 3) + 3
        mask = torch.ones_like(ids) if self.mask == "ones" else self.common.random_attention_mask(shape)
        return config, {"input_ids": ids, "attention_mask": mask}

    def prepare_config_and_inputs_for_model_class(self, _: type) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        """There is one class."""
        return self.prepare_config_and_inputs_for_common()


def model_class_of(model_type: str) -> Any:
    """The class with the language-modelling head."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(models.tiny_config(model_type))]


def case_of(model_type: str, mask: str, common: ModuleType) -> type[unittest.TestCase]:
    """A test case as transformers has one for each type, of the class with the language-modelling head alone."""

    def set_up(self: Any) -> None:
        random.seed(0)
        common.global_rng.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        self.model_tester = ModelTester(model_type, mask, common)

    body = {
        "setUp": set_up,
        "all_model_classes": (model_class_of(model_type),),
        "has_attentions": hasattr(models.tiny_config(model_type), "num_attention_heads"),
        # Prompts that no row has get none.
        "test_all_params_have_gradient": False,
    }
    return type(f"{model_type}_{mask}", (common.ModelTesterMixin, unittest.TestCase), body)

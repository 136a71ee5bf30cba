"""Masks of a static cache keep their shape, and are what `generate` of the bare model makes where that is needed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lightning_softprompt.attachment import masks
from tests import tiny
from tests.conformance import models

MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


def test_a_mask_is_widened_to_the_columns_of_a_static_cache_without_recurrent_layers() -> None:
    config = tiny.tiny_model().config
    found = masks.widened(StaticCache(config=config, max_cache_len=5), MASK)
    assert found.tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    recurrent = StaticCache(config=models.build("bamba").config, max_cache_len=5)
    for cache in (recurrent, DynamicCache(config=config), None):
        assert masks.widened(cache, MASK) is MASK


@pytest.mark.parametrize("model_type, is_static, is_expected", [
    ("bamba", True, True), ("bamba", True, False), ("bamba", False, True), ("llama", True, True),
])  # fmt: skip
def test_masks_are_made_for_recurrent_layers_in_generation_alone(
    model_type: str, is_static: bool, is_expected: bool
) -> None:
    model = models.build(model_type)
    config = model.config
    cache = StaticCache(config=config, max_cache_len=5) if is_static else DynamicCache(config=config)
    model(torch.tensor([[5, 6], [7, 8]]), attention_mask=MASK[:, :2], past_key_values=cache, use_cache=True)
    if is_expected:
        masks.expect(cache)
    found = masks.of_step(model, cache, MASK, torch.tensor([[9], [9]]), torch.tensor([[1], [2]]))
    if (model_type, is_static, is_expected) != ("bamba", True, True):
        assert found is None
        return
    widths = {mask.shape[-1] for mask in found.values() if mask is not None and mask.ndim == 4}
    assert widths == {5}


def test_a_models_own_method_makes_them() -> None:
    class Own(type(tiny.tiny_model())):  # type: ignore[misc]
        @staticmethod
        def create_masks_for_generate(**arguments: object) -> object:
            return arguments

    model = Own(tiny.tiny_model().config)
    assert masks.own(model, config=1) == {"config": 1}

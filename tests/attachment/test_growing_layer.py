"""A layer that grows in place holds what transformers' own layer holds, whatever is done to both."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lightning_softprompt.attachment.growing_layer import GrowingLayer


def states(rows: int, columns: int, draw: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values, of different sizes, as DeepSeek has them."""
    return (
        torch.randn(rows, 2, columns, 4, generator=draw).to(dtype),
        torch.randn(rows, 2, columns, 3, generator=draw).to(dtype),
    )


def change(layer: DynamicLayer, what: str, seed: int) -> DynamicLayer:
    draw = torch.Generator().manual_seed(seed)
    rows = layer.keys.shape[0]
    if what == "crop":
        layer.crop(-min(layer.get_seq_length() - 1, 1 + seed % 4))
    elif what == "select":
        layer.batch_select_indices(torch.randint(rows, (max(rows - 1, 1),), generator=draw))
    elif what == "repeat" and rows < 4:
        layer.batch_repeat_interleave(2)
    elif what == "reorder":
        layer.reorder_cache(torch.randperm(rows, generator=draw))
    elif what == "copy":
        return copy.deepcopy(layer)
    return layer


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_the_usual_layer_is(seed: int) -> None:
    draw, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    mine, usual = GrowingLayer(), DynamicLayer()
    for layer in (mine, usual):
        layer.update(*states(3, 2, torch.Generator().manual_seed(seed)))
    kinds = ["none", "crop", "select", "repeat", "reorder", "copy", "inference", "grad"]
    for step in range(150):
        what = chance.choices(kinds, [9] + 7 * [1])[0]
        mine, usual = change(mine, what, step), change(usual, what, step)
        new = states(usual.keys.shape[0], chance.choice([1, 1, 1, 7]), draw)
        with torch.inference_mode(what == "inference"), torch.set_grad_enabled(what == "grad"):
            found, expected = mine.update(*new), usual.update(*new)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert mine.get_seq_length() == usual.get_seq_length()
        assert torch.equal(mine.keys, usual.keys) and torch.equal(mine.values, usual.values)


@torch.no_grad()
def test_columns_stay_where_they_are_while_others_come() -> None:
    draw, layer = torch.Generator().manual_seed(0), GrowingLayer()
    layer.update(*states(2, 10, draw))
    places = set()
    for _ in range(32):
        layer.update(*states(2, 1, draw))
        places.add(layer.keys.data_ptr())
    assert len(places) == 1


@torch.no_grad()
def test_what_was_handed_out_never_changes() -> None:
    draw, layer = torch.Generator().manual_seed(0), GrowingLayer()
    handed = [tuple(each.clone() for each in layer.update(*states(2, 3, draw)))]
    held = [layer.update(*states(2, 1, draw))]
    handed.append(tuple(each.clone() for each in held[0]))
    layer.crop(-2)
    layer.update(*states(2, 2, draw))  # other columns in place of those that were cut off
    assert all(torch.equal(then, now) for then, now in zip(handed[1], held[0], strict=True))


def test_gradients_pass_through() -> None:
    draw, layer = torch.Generator().manual_seed(0), GrowingLayer()
    keys, values = states(1, 2, draw)
    layer.update(keys.requires_grad_(), values)
    all_keys, _ = layer.update(*states(1, 1, draw))
    all_keys.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


@torch.no_grad()
def test_another_dtype_is_promoted_as_usual() -> None:
    draw, layer = torch.Generator().manual_seed(0), GrowingLayer()
    layer.update(*states(1, 2, draw, torch.bfloat16))
    keys, _ = layer.update(*states(1, 1, draw))
    assert keys.dtype == torch.float32

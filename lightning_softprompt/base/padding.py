"""Padding: on which side a model's rows are padded, with which token, and how rows of unequal length become tensors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_softprompt.base.model_types import PADDED_ON_THE_LEFT, PADDED_ON_THE_RIGHT, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def padding_side(model: PreTrainedModel) -> str:
    """The side of the pads: "left", or "right" for a model whose rows must begin at the first column.

    A model that takes no `position_ids` is padded on the right, as it counts columns or reads pads. The exceptions in
    both directions are listed in `model_types`.
    """
    if reason(PADDED_ON_THE_LEFT, model.config):
        return "left"
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return "left" if takes_positions and not reason(PADDED_ON_THE_RIGHT, model.config) else "right"


def pad_token_id(tokenizer: Any, vocabulary: int | None = None) -> int:
    """The id of the tokenizer's pad token, else of its end-of-text token, else of another special token, else 0.

    Any id will do that a model of `vocabulary` ids can look up, because pads are masked. The model does look it up:
    `generate` feeds pads to the rows that have ended.
    """
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids):
        if found is not None and (vocabulary is None or 0 <= found < vocabulary):
            return int(found)
    return 0


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of unequal length as one int64 tensor `[batch, length]`, with `value` in front of the shorter rows."""
    width = max(len(row) for row in rows)
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows], device="cpu")


def padded_inputs(rows: Sequence[Sequence[int]], pad: int, device: Any = None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 `[batch, length]`, of rows of unequal length, padded on the left."""
    return {
        "input_ids": pad_left(rows, pad).to(device),
        "attention_mask": pad_left([[1] * len(row) for row in rows], 0).to(device),
    }

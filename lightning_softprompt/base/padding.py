"""On which side the rows of a model are padded, with what, and ragged rows as padded ones."""

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
    """Where pads go: "left", or "right" for a model whose rows have to begin at the first column.

    Such models take no positions, and count columns or read pads; exceptions stand in `model_types`.
    """
    if reason(PADDED_ON_THE_LEFT, model.config):
        return "left"
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return "left" if takes_positions and not reason(PADDED_ON_THE_RIGHT, model.config) else "right"


def pad_token_id(tokenizer: Any, vocabulary: int | None = None) -> int:
    """The tokenizer's pad token, else its end-of-text token, else another special one, else 0.

    Pads are masked, so any will do that a model of `vocabulary` ids can look up: `generate` feeds them to rows that
    have ended.
    """
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids):
        if found is not None and (vocabulary is None or 0 <= found < vocabulary):
            return int(found)
    return 0


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Ragged rows as int64 `[batch, length]`, with `value` in front of the shorter ones."""
    width = max(len(row) for row in rows)
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])


def padded_inputs(rows: Sequence[Sequence[int]], pad: int, device: Any = None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of ragged rows, padded on the left."""
    return {
        "input_ids": pad_left(rows, pad).to(device),
        "attention_mask": pad_left([[1] * len(row) for row in rows], 0).to(device),
    }

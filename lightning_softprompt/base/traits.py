"""What a model takes, in one look."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_softprompt.base.model_types import POSITIONS_FROM_ONE, reason
from lightning_softprompt.base.padding import padding_side
from lightning_softprompt.base.special_ids import placeholder_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelTraits:
    """What laying out rows for a model has to know about it.

    Attributes:
        model: the causal LM.
        arguments: names of its forward's arguments, in order.
        padding_side: where pads go, "left" or "right".
        position_offset: what its positions start from.
        placeholder: an id for columns that hold no token; none that a model or a processor gives a meaning to.
        shifts_its_loss: whether its loss is the usual cross entropy, shifted by one column.
        positions: how many rows its table of positions has, counted with the offset; None where it has no table.
        longest_rotation: beyond how many columns rotary embeddings depend on the longest row; None for never.
    """

    model: PreTrainedModel
    arguments: tuple[str, ...]
    padding_side: str
    position_offset: int
    placeholder: int
    shifts_its_loss: bool
    positions: int | None
    longest_rotation: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelTraits:
        """Look a model over."""
        arguments = tuple(inspect.signature(model.forward).parameters)
        return cls(
            model,
            arguments,
            padding_side=padding_side(model),
            position_offset=_position_offset(model),
            placeholder=placeholder_id(model),
            shifts_its_loss=getattr(model, "loss_type", None) in ("ForCausalLM", None) and _calls_loss_function(model),
            positions=_positions(model),
            longest_rotation=_longest_rotation(model),
        )

    def has_usual_loss(self, call: Mapping[str, Any]) -> bool:
        """Whether a call's loss is the usual one and nothing else, such as what balances a mixture of experts."""
        balances = call.get("output_router_logits", getattr(self.model.config, "output_router_logits", False))
        return self.shifts_its_loss and not balances and call.get("shift_labels") is None


def _calls_loss_function(model: PreTrainedModel) -> bool:
    try:
        return "self.loss_function(" in inspect.getsource(type(model).forward)
    except (OSError, TypeError):  # a class without source
        return False


def _positions(model: PreTrainedModel) -> int | None:
    names = {name.rpartition(".")[2] for name, _ in (*model.named_modules(), *model.named_buffers())}
    has_table = any(name == "wpe" or "position" in name for name in names)
    count = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return count if has_table and isinstance(count, int) and count > 0 else None


def _longest_rotation(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            return int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


def _position_offset(model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from `padding_idx + 1`, most others from 0."""
    if reason(POSITIONS_FROM_ONE, model.config):
        return 1
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0

"""`ModelTraits`: the properties of a model that decide how its rows are laid out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lightning_softprompt.base.model_types import DISTANCE_IN_COLUMNS, NO_PREFIX, POSITIONS_FROM_ONE, reason
from lightning_softprompt.base.padding import padding_side
from lightning_softprompt.base.special_ids import placeholder_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelTraits:
    """The properties of a model that the layout of its rows depends on.

    Attributes:
        model: the causal LM.
        arguments: names of the arguments of its `forward`, in order.
        cache_argument: the name of its argument for a cache of keys and values: "cache" from transformers 5.24 on,
            "past_key_values" before; empty where it takes none.
        padding_side: the side of the pads, "left" or "right".
        position_offset: the position of a row's first token.
        placeholder: the id for columns that hold no token; neither the model nor a logits processor gives it a meaning.
        shifts_its_loss: whether its loss is the usual cross entropy, shifted by one column.
        positions: number of entries of its table of positions, including the offset; None if it has no table.
        longest_rotation: the number of columns above which its rotary embedding depends on the longest row of the
            batch; None if it never does.
        obstacle: why its prompts are never a prefix, that is, keys and values of their own; None if they may be.
        longest_with_gaps: the number of columns above which a row with pads inside is not what it is alone: the fewest
            that a layer looks back at; 0 if pads count as distance or may be read; None if there is no limit.
    """

    model: PreTrainedModel
    arguments: tuple[str, ...]
    cache_argument: str
    padding_side: str
    position_offset: int
    placeholder: int
    shifts_its_loss: bool
    positions: int | None
    longest_rotation: int | None
    obstacle: str | None
    longest_with_gaps: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelTraits:
        """Find out the traits of a model."""
        arguments = tuple(inspect.signature(model.forward).parameters)
        cache_argument = next((name for name in ("cache", "past_key_values") if name in arguments), "")
        side = padding_side(model)
        obstacle = _obstacle(model) if cache_argument and side == "left" else "it takes no position_ids and cache"
        return cls(
            model,
            arguments,
            cache_argument=cache_argument,
            padding_side=side,
            position_offset=_position_offset(model),
            placeholder=placeholder_id(model),
            shifts_its_loss=getattr(model, "loss_type", None) in ("ForCausalLM", None) and _calls_loss_function(model),
            positions=_positions(model),
            longest_rotation=_longest_rotation(model),
            obstacle=obstacle,
            longest_with_gaps=_window(model) if obstacle is None else 0,
        )

    @property
    def takes_positions(self) -> bool:
        """Whether it goes by the positions that it is told."""
        return "position_ids" in self.arguments and self.padding_side == "left"

    def has_usual_targets(self, call: Mapping[str, Any]) -> bool:
        """Whether each column of a call predicts the next column's label."""
        return self.shifts_its_loss and call.get("shift_labels") is None

    def has_usual_loss(self, call: Mapping[str, Any]) -> bool:
        """Whether a call's loss is the usual cross entropy alone: no `shift_labels`, no term that balances experts."""
        balances = call.get("output_router_logits", getattr(self.model.config, "output_router_logits", False))
        return self.has_usual_targets(call) and not balances and call.get("ignore_index") is None


def _calls_loss_function(model: PreTrainedModel) -> bool:
    try:
        return "self.loss_function(" in inspect.getsource(type(model).forward)
    except (OSError, TypeError):  # the source of the class is not available
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
    """The position of a row's first token: `padding_idx + 1` for RoBERTa and its relatives, 0 for most others."""
    if reason(POSITIONS_FROM_ONE, model.config):
        return 1
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _obstacle(model: PreTrainedModel) -> str | None:
    if why := reason(NO_PREFIX, model.config):
        return why
    if getattr(model.config.get_text_config(decoder=True), "use_bidirectional_attention", False):
        return "it looks at what comes after"
    for layer in _layers(model):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"it keeps something else than keys and values of its layers ({type(layer).__name__})"
    return None


def _window(model: PreTrainedModel) -> int | None:
    if reason(DISTANCE_IN_COLUMNS, model.config):
        return 0
    sizes = [layer.sliding_window for layer in _layers(model) if isinstance(layer, DynamicSlidingWindowLayer)]
    local = getattr(model.config, "window_size", None)
    if isinstance(local, int):  # GPT-Neo, whose cache keeps all columns
        sizes.append(local)
    return min(sizes, default=None)


def _layers(model: PreTrainedModel) -> list[Any]:
    """The layers of an empty cache, as the model would make one; `[None]` if it can make none."""
    try:
        return DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, ValueError):
        return [None]

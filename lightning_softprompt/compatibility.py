"""Which models can take soft prompts; the others are refused by name, with the reason."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.init import special_ids, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_softprompt.prompts import SoftPrompts

# They read token ids beside the embeddings, and a virtual token has none; or something else that no prompt has.
_CANNOT: dict[str, str] = {
    "blt": "it groups the bytes of the ids into patches, and virtual tokens have no id",
    "cpmant": "it builds its inputs from the ids, and virtual tokens have no id",
    "deepseek_v4": "it routes experts by a hash of the ids, and virtual tokens have no id",
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        "it has embeddings per layer, looked up by id, and virtual tokens have no id",
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "it reads hidden states and keys of the model it assists"
    ),
    "prophetnet": "it reads pads, so padded rows are not exact",
}
# They take positions, and yet a convolution, an index or chunks count columns or read pads on the left.
_COUNT_COLUMNS = {"git", "minimax_m3_vl_text", "recurrent_gemma", "reformer"}
CANNOT_CONTINUE = {"reformer": "that holds buckets of hashes, not columns"}


def check_model(model: object) -> None:
    """Raise a `SoftPromptError` unless `model` is a decoder-only model with a language-modelling head."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        more = ""
        if hasattr(model, "peft_config"):
            more = "; of a PEFT model, attach to model.get_base_model()"
        elif hasattr(model, "_orig_mod"):
            more = "; attach first, then compile: torch.compile(attach(model, prompts))"
        raise SoftPromptError(f"attach needs a transformers PreTrainedModel, got {name}{more}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise SoftPromptError(f"{name} is an encoder-decoder; soft prompts here are for decoder-only causal LMs")
    if not has_language_modelling_head(model):
        raise SoftPromptError(
            f"{name} has no language-modelling head; load the model with AutoModelForCausalLM. To classify, let the "
            "model write the label and rank the labels' words (CausalLMModule does)"
        )
    reason = _CANNOT.get(model.config.model_type)
    if "lsh" in getattr(model.config, "attn_layers", ()):  # Reformer
        reason = "what its hashes of a row depend on is the padded width, so padded rows are not exact"
    if reason is not None:
        raise SoftPromptError(f"{name} cannot take soft prompts: {reason}")


def has_language_modelling_head(model: PreTrainedModel) -> bool:
    """Whether `model` puts out logits of next tokens."""
    return bool(model.can_generate()) and model.get_output_embeddings() is not None


def check_prompts(model: PreTrainedModel, prompts: SoftPrompts) -> None:
    """Raise a `SoftPromptError` unless `prompts` hold tasks and fit `model`."""
    from lightning_softprompt.base_model import BaseModel
    from lightning_softprompt.prompts import SoftPrompts

    if not isinstance(prompts, SoftPrompts):
        raise SoftPromptError(f"prompts must be SoftPrompts, got {type(prompts).__name__}; make them with for_model")
    if not len(prompts):
        raise SoftPromptError("there is no task in these prompts; add one first")
    width = BaseModel.of(model).hidden_size
    if prompts.hidden_size != width:
        raise SoftPromptError(
            f"the prompts are {prompts.hidden_size} wide, the embeddings of {type(model).__name__} are {width}; "
            "these prompts were made for another base model"
        )
    if prompts.base is not None:
        prompts.base.check(model)


@dataclass(frozen=True)
class ModelTraits:
    """What laying out rows for a model has to know about it.

    Attributes:
        model: the causal LM.
        arguments: names of its forward's arguments, in order.
        side: where pads go. Models that take no positions count columns or read pads: their rows begin at the first
            column.
        position_offset: what its positions start from.
        placeholder: an id for columns that hold no token; none that a model or a processor gives a meaning to.
        shifts_its_loss: whether its loss is the usual cross entropy, shifted by one column.
        longest_rotation: beyond how many columns rotary embeddings depend on the longest row; None for never.
    """

    model: PreTrainedModel
    arguments: tuple[str, ...]
    side: str
    position_offset: int
    placeholder: int
    shifts_its_loss: bool
    longest_rotation: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelTraits:
        """Look a model over."""
        arguments = tuple(inspect.signature(model.forward).parameters)
        special = special_ids(model)
        placeholder = next((i for i in range(vocabulary_size(model)) if i not in special), 0)
        takes_positions = "position_ids" in arguments and model.config.model_type not in _COUNT_COLUMNS
        side = "left" if takes_positions else "right"
        shifts = getattr(model, "loss_type", None) in ("ForCausalLM", None) and _calls_loss_function(model)
        return cls(model, arguments, side, _position_offset(model), placeholder, shifts, _longest_rotation(model))

    def has_usual_loss(self, call: dict[str, Any]) -> bool:
        """Whether a call's loss is the usual one and nothing else, such as what balances a mixture of experts."""
        config = self.model.config
        return self.shifts_its_loss and not call.get(
            "output_router_logits", getattr(config, "output_router_logits", False)
        )


def _calls_loss_function(model: PreTrainedModel) -> bool:
    try:
        return "self.loss_function(" in inspect.getsource(type(model).forward)
    except (OSError, TypeError):  # a class without source
        return False


def _longest_rotation(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            return int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


def _position_offset(model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from `padding_idx + 1`, others from 0."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0

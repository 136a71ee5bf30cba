"""Which models can take soft prompts. For any other model the error names the model and the reason."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from lightning_softprompt.base.model_types import reason_against_soft_prompts
from lightning_softprompt.errors import SoftPromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_model(model: object) -> None:
    """Raise a `SoftPromptError` unless `model` is a causal LM of transformers that can take soft prompts."""
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
    reason = reason_against_soft_prompts(model.config)
    if reason is not None:
        raise SoftPromptError(f"{name} cannot take soft prompts: {reason}")
    if _is_called_past_its_hooks(model):
        raise SoftPromptError(
            f"PEFT {version('peft')} calls a {name} that it wraps past its hooks, so its rows would get no prompt; "
            "install peft>=0.21"
        )


def check_has_weights(model: PreTrainedModel) -> None:
    """Raise a `SoftPromptError` for a model whose weights are not loaded, for example one on the meta device.

    Layers that accelerate offloads are accepted, because accelerate fetches their weights when they run. An offloaded
    input embedding is not accepted, because the library also reads it outside a forward pass.
    """
    name = type(model).__name__
    is_offloaded = hasattr(model, "hf_device_map") or any(hasattr(module, "_hf_hook") for module in model.modules())
    if any(parameter.is_meta for parameter in model.get_input_embeddings().parameters()):
        where = "offloaded; keep it on a device, by device_map" if is_offloaded else "on the meta device; load it first"
        raise SoftPromptError(f"the input embedding of {name} is {where}")
    if not is_offloaded and any(parameter.is_meta for parameter in model.parameters()):
        raise SoftPromptError(f"weights of {name} are on the meta device; load them first")


def has_language_modelling_head(model: PreTrainedModel) -> bool:
    """Whether `model` computes logits of next tokens."""
    return bool(model.can_generate()) and model.get_output_embeddings() is not None


def _is_called_past_its_hooks(model: PreTrainedModel) -> bool:
    """Whether a wrapper of PEFT before 0.21 calls the model. An adapter that transformers loads has no wrapper."""
    is_wrapped = hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False)
    return is_wrapped and tuple(map(int, version("peft").split(".")[:2])) < (0, 21)

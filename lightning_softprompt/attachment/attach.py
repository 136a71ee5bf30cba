"""`attach` and `detach`: soft prompts in front of the rows of a Hugging Face causal LM, in place. Plain PyTorch.

An attached model speaks of the text alone: ids, masks, positions, labels, logits and cache lengths have the text's
columns, and so everything built on a model works on it unchanged. Three hooks do it. Before a forward pass the rows
are laid out by `prompt_concat`, and the model is handed ids of that width, with placeholders where prompts stand;
after its input embedding the laid-out embeddings take the place of those ids' own; after the pass, outputs are
brought back to the text's columns. Placeholder ids serve models whose generation refuses `inputs_embeds`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn

from lightning_softprompt.attachment.attachment import SUBMODULE, Attachment
from lightning_softprompt.attachment.loss import LogitsChoice
from lightning_softprompt.attachment.prefix_choice import PrefixChoice
from lightning_softprompt.base.support import check_model
from lightning_softprompt.errors import SoftPromptError, check_choice
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

_ATTRIBUTE = "soft_prompt_attachment"


def attach(
    model: Model,
    prompts: SoftPrompts,
    prefix: PrefixChoice = "auto",
    logits: LogitsChoice = "all",
    micro_batch_size: int | None = None,
) -> Model:
    """Put `prompts` in front of the rows of `model`, in place.

    Afterwards `model(input_ids=…, attention_mask=…, labels=…, task_ids=…)` and `model.generate(…, task_ids=…)` take
    one task a row (int64 `[batch]`, -1 for none, or `tasks=[names]`) and return what they always return, at the
    columns of the input. The base is frozen and kept in eval mode; the prompts become its submodule
    `soft_prompts`, which its state dict leaves out.

    Args:
        model: any Hugging Face decoder-only model with a language-modelling head.
        prompts: made for this base model.
        prefix: "auto": where that is exact and pays, a prompt is computed once for a task, as attention keys and
            values that all its rows share; elsewhere it stands in every row's sequence. "always" raises where it is
            not exact, "never" puts all prompts into the sequence.
        logits: "all", or "labels": with labels given, logits are computed where a label is alone, and the output
            carries the loss and no logits.
        micro_batch_size: rows of which a step of training holds the activations at a time, with `logits="labels"`; the
            loss and the gradients are those of all rows. None for all of them.

    Returns:
        `model`.

    Raises:
        SoftPromptError: a model that cannot take soft prompts, or prompts of another base model; a model that takes
            no prefix, with "always"; a micro_batch_size without `logits="labels"`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_softprompt import SoftPrompts, Tokens
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> text = torch.tensor([[9, 8, 7]])
        >>> hard = model(torch.tensor([[5, 6, 9, 8, 7]])).logits[:, 2:]
        >>> _ = attach(model, SoftPrompts.for_model(model, {"toy": Tokens([5, 6])}))
        >>> torch.allclose(model(text, task_ids=torch.tensor([0])).logits, hard, atol=1e-6)
        True
    """
    check_model(model)
    if attachment_of(model) is not None:
        raise SoftPromptError("this model has soft prompts attached already; call detach(model) first")
    if SUBMODULE in model._modules:
        raise SoftPromptError(
            "this model is a shallow copy of one that has prompts attached, and shares its hooks; copy it with "
            "copy.deepcopy"
        )
    check_choice("prefix", prefix, PrefixChoice)
    check_choice("logits", logits, LogitsChoice)
    if micro_batch_size is not None:
        if not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise SoftPromptError(f"micro_batch_size must be a number of rows from 1, got {micro_batch_size!r}")
        if logits != "labels":
            raise SoftPromptError(
                "micro_batch_size gives the loss of a step and no logits; say so with logits='labels', or leave it out"
            )
    if not isinstance(prompts, SoftPrompts):
        raise SoftPromptError(f"prompts must be SoftPrompts, got {type(prompts).__name__}; make them with for_model")
    prompts.check_fits(model)
    setattr(model, _ATTRIBUTE, Attachment(model, prompts, prefix, logits, micro_batch_size))
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the model becomes what it was before, with the `requires_grad` and the modes that it had.

    Returns:
        `model`.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise SoftPromptError("this model has no soft prompts attached; there is nothing to detach")
    attachment.remove()
    delattr(model, _ATTRIBUTE)
    return model


def attachment_of(model: nn.Module) -> Attachment | None:
    """What `attach` left on `model`, or None; a shallow copy of an attached model has none of its own."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if found is not None and found.model is model else None


def attachment_inside(module: nn.Module) -> Attachment | None:
    """What `attach` left on a model somewhere in `module`, or None."""
    return next((found for each in module.modules() if (found := attachment_of(each)) is not None), None)

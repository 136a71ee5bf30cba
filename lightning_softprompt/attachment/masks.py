"""Masks of a static cache, which keep their shape as tokens come, so that a pass compiled for one does for the next."""

from __future__ import annotations

from inspect import getattr_static, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Its name from transformers 5.24 on, and the one before.
_CACHE = next(name for name in signature(create_masks_for_generate).parameters if name in ("cache", "past_key_values"))
_ARE_MADE = "soft_prompt_masks_are_made"


def own(model: PreTrainedModel, **arguments: Any) -> Any:
    """The masks that `generate` of the bare model makes before a pass, by the model's own method where it has one."""
    kind = type(model)
    method = getattr_static(kind, "create_masks_for_generate", None)  # a method, or a static one
    return (create_masks_for_generate if method is None else method.__get__(model, kind))(**arguments)


def expect(cache: Any) -> None:
    """Note that the passes over this cache are those of a `generate` that makes their masks, which the model takes."""
    setattr(cache, _ARE_MADE, True)


def widened(cache: Any, mask: Tensor) -> Tensor:
    """The mask `[batch, columns]`, widened to all columns of a static cache: Bloom counts those that are still empty.

    Recurrent layers read the mask of the new columns alone. For a model that has such layers it is not widened.
    """
    if not isinstance(cache, StaticCache) or not _layers_have_a_size(cache):
        return mask
    return functional.pad(mask, (0, max(int(cache.get_max_length()) - mask.shape[1], 0)))


def of_step(model: PreTrainedModel, cache: Any, mask: Tensor, text: Tensor, positions: Tensor | None) -> Any:
    """The masks of a decoding step; None where the widened one does.

    Args:
        model: that decodes.
        cache: that the step goes on from.
        mask: of all columns so far, `[batch, columns]`.
        text: what is new, `[batch, new]` or `[batch, new, hidden]`.
        positions: of the new columns, or None.
    """
    if not isinstance(cache, StaticCache) or not hasattr(cache, _ARE_MADE) or _layers_have_a_size(cache):
        return None
    shape = torch.empty((*text.shape[:2], 0), dtype=model.dtype, device=text.device)
    given = {"attention_mask": mask, _CACHE: cache, "position_ids": positions, "is_first_iteration": False}
    return own(model, config=model.config, inputs_embeds=shape, **given)


def _layers_have_a_size(cache: StaticCache) -> bool:
    return all(layer.get_max_length() >= 0 for layer in cache.layers)

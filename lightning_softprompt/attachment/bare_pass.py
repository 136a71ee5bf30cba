"""A forward pass in which no row has a prompt: the model's own, whatever it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.attachment import caches
from lightning_softprompt.attachment.call import valid_ids
from lightning_softprompt.attachment.forward_pass import ForwardPass
from lightning_softprompt.attachment.loss import LogitsChoice, Scoring
from lightning_softprompt.attachment.substitution import with_gradient
from lightning_softprompt.base.model_types import OWN_POSITIONS, reason
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.prompts.bank import PromptBank


class BarePass(ForwardPass):
    """The model's own pass, in which a padded row is what it is alone.

    Behind pads, its positions count from its first token. The pads around it are not scored, and predict nothing.

    Args:
        traits: of the model.
        arguments: what was given, by name.
        prompts: those attached to it.
        logits: "all" or "labels".
    """

    def __init__(
        self, traits: ModelTraits, arguments: Mapping[str, Any], prompts: PromptBank, logits: LogitsChoice
    ) -> None:
        super().__init__(traits, arguments, caches.find(arguments))
        self._prompts = prompts
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        text = embeds if ids is None else ids
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and text is not None:
            self._follow(mask, text.shape[1])
        labels = self.arguments.get("labels")
        if isinstance(labels, Tensor) and logits == "labels" and text is not None and labels.shape == text.shape[:2]:
            self._score(Scoring.inline(traits, self.arguments, labels, logits))
        if embeds is not None:
            self.arguments["inputs_embeds"] = self._with_gradient(embeds)

    def replace_embeddings(self, output: Tensor) -> Tensor:
        """The model's own embeddings."""
        return self._with_gradient(output)

    def _follow(self, mask: Tensor, new: int) -> None:
        cached = caches.length(self.cache) or 0
        if mask.shape[1] < cached + new:
            return
        ids = self.arguments.get("input_ids")
        if ids is not None:
            self.arguments["input_ids"] = valid_ids(self.traits, ids, mask)
        pads = ((mask[:, : cached + new] != 0).cumsum(1) == 0).sum(1, keepdim=True)  # in front of each row
        columns = torch.arange(cached, cached + new, device=mask.device)
        counts_itself = reason(OWN_POSITIONS, self.traits.model.config) is not None
        if self.traits.takes_positions and not counts_itself and self.arguments.get("position_ids") is None:
            self.arguments["position_ids"] = (columns - pads).clamp(min=0) + self.traits.position_offset
        labels = self.arguments.get("labels")
        if isinstance(labels, Tensor) and labels.shape == mask.shape and self.traits.has_usual_targets(self.arguments):
            is_first = (columns <= pads) & (pads > 0)  # alone, nothing predicts it; here a pad would
            is_behind = (mask != 0).flip(1).cumsum(1).flip(1) == 0
            self.arguments["labels"] = labels.masked_fill(is_first | is_behind, -100)

    def _with_gradient(self, embeds: Tensor) -> Tensor:
        return embeds if embeds.is_inference() else self._prompts.with_zero_gradients(with_gradient(embeds))

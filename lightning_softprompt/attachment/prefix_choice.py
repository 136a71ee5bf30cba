"""Which of two ways a batch gets its prompts: as a prefix, computed once a task, or inline, in every row's sequence."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, StaticCache

from lightning_softprompt.attachment.call import Call
from lightning_softprompt.attachment.routing import TaskRows
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

logger = logging.getLogger("lightning_softprompt")


PrefixChoice = Literal["auto", "always", "never"]

# The share of a batch's columns that a prefix has to save in training on a GPU, where each pass over the model launches
# its kernels and reads its weights again. On an H200, models of 1 and 8 billion parameters trained slower with a prefix
# by 1.16 to 2.5 times where it saved 4 to 33 percent, and as fast where it saved 53 or 73 (results/gpu-h200.md).
_WORTH_A_PASS = 0.5


class PrefixPolicy:
    """Decides for each batch of one attached model, and logs each reason against a prefix once.

    Args:
        traits: of the model.
        prompts: attached to it.
        wanted: "auto", "always" or "never".

    Raises:
        SoftPromptError: "always", and the model takes no prefix.
    """

    def __init__(self, traits: ModelTraits, prompts: SoftPrompts, wanted: PrefixChoice) -> None:
        self._traits = traits
        self._prompts = prompts
        self._wanted = wanted
        self._said: set[str] = set()
        self._cannot = f"prefix='always' cannot be had for {type(traits.model).__name__}"
        self._is_sharded = any(isinstance(module, FSDPModule) for module in traits.model.modules())
        if wanted == "always" and traits.obstacle:
            raise SoftPromptError(f"{self._cannot}: {traits.obstacle}; use 'auto' or 'never'")

    def applies(self, call: Call, rows: TaskRows, to_come: int, recomputes: bool) -> bool:
        """Whether the rows of a call get their prompts as a prefix.

        Args:
            call: what was given; its cache is empty, or None.
            rows: whose task is which.
            to_come: columns of text that will follow; 0 where nothing tells.
            recomputes: whether gradient checkpointing runs layers twice.

        Raises:
            SoftPromptError: "always", and the batch takes no prefix.
        """
        if self._wanted == "never" or not rows.active:
            return False
        why = self._traits.obstacle or self._obstacle_of_batch(call, rows, to_come, recomputes)
        if why is None:
            return self._wanted == "always" or self._pays(call, rows)
        if self._wanted == "always":
            raise SoftPromptError(f"{self._cannot}: {why}; use 'auto' or 'never'")
        if why not in self._said:
            self._said.add(why)
            logger.warning(
                "%s: prompts go into the sequence of every row, and each row pays for its own: %s",
                type(self._traits.model).__name__,
                why,
            )
        return False

    def _pays(self, call: Call, rows: TaskRows) -> bool:
        """Whether a prefix saves time: where it is kept, and in training where it saves enough of the columns."""
        if not self._prompts.want_gradients(rows.active):
            return True
        inline = sum(rows.lengths) + call.text.shape[0] * call.text.shape[1]
        saved = sum(rows.lengths) - sum(rows.active_lengths)
        return saved > 0 if call.text.device.type == "cpu" else saved >= _WORTH_A_PASS * inline

    def _obstacle_of_batch(self, call: Call, rows: TaskRows, to_come: int, recomputes: bool) -> str | None:
        if recomputes:
            return "gradient checkpointing turns the cache off, in which a prefix stands"
        if self._is_sharded:
            # All ranks have to make the same passes, but a rank computes the prefixes that it misses. Besides, FSDP2 of
            # PyTorch 2.13 gathers a layer's weights for backward by the gradient of its output, and of a prefix only
            # keys and values have one.
            return "FSDP2 shards the base, so that every rank has to make the same passes"
        if call.cache is not None and type(call.cache) not in (DynamicCache, StaticCache):
            return f"the cache is a {type(call.cache).__name__}"
        if torch.is_grad_enabled() and not self._prompts.want_gradients(rows.active):
            return "gradients are recorded, and no prompt of the batch trains"
        if call.labels is not None:
            if not self._traits.has_usual_loss(call.arguments):
                return "its loss is not the usual cross entropy"
            keep = call.arguments.get("logits_to_keep")
            if isinstance(keep, Tensor) or keep:
                return "labels were given together with logits_to_keep"
        if call.arguments.get("token_type_ids") is not None:
            return "types of tokens were given, and a prompt has that of its row's first token"
        if self._traits.position_offset and call.positions is not None:
            return "positions were given, which may count from 0 or from where the model's own begin"
        columns = max(rows.lengths) + call.text.shape[1] + to_come
        if self._traits.longest_rotation is not None and columns > self._traits.longest_rotation:
            return f"the rotary embedding depends on the longest row beyond {self._traits.longest_rotation} tokens"
        most = self._traits.longest_with_gaps
        if most is not None and columns > most and call.mask is not None and bool((call.mask[:, 0] == 0).any()):
            where = f"a window of {most} columns" if most else "columns"
            return (
                f"pads stand between prompt and text, and it counts distance in {where}; pad on the right to train, or "
                "give rows of equal length"
            )
        return None

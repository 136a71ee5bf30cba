"""The loss of a pass, where it is computed here: at the positions that predict a label alone, or behind a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lightning_softprompt.attachment.frozen_head import summed_cross_entropy
from lightning_softprompt.attachment.layout import Layout
from lightning_softprompt.attachment.parts import EarlierParts
from lightning_softprompt.attachment.substitution import Substitution
from lightning_softprompt.base.traits import ModelTraits

LogitsChoice = Literal["all", "labels"]


@dataclass
class Scoring:
    """What is scored in one pass.

    Attributes:
        traits: of the model.
        positions: rows and columns, int64 `[count]` each, whose logits are wanted; None for all.
        targets: what these positions predict, `[1, count]`, or what all do, `[batch, width]`, -100 for nothing; None
            where the model computes its own loss.
        drops_logits: whether the caller wants the loss alone.
        count: `num_items_in_batch`, if the caller gave it.
        first: logits `[batch, vocabulary]` behind the prompts, and the first tokens of text that they predict,
            `[batch]`.
        earlier: the parts of a step of which this is the last; None for a step in one.
    """

    traits: ModelTraits
    positions: tuple[Tensor, Tensor] | None
    targets: Tensor | None
    drops_logits: bool
    count: Any = None
    first: tuple[Tensor, Tensor] | None = None
    earlier: EarlierParts | None = None

    @classmethod
    def inline(cls, traits: ModelTraits, call: Mapping[str, Any], labels: Tensor, logits: LogitsChoice) -> Scoring:
        """Scores laid-out labels `[batch, width]`. Where all logits are wanted the model computes its loss itself."""
        if logits == "all" or not traits.has_usual_loss(call):
            return cls(traits, None, None, logits == "labels")
        return cls._of(traits, call, _next(labels), logits)

    @classmethod
    def behind_prefix(
        cls,
        traits: ModelTraits,
        call: Mapping[str, Any],
        labels: Tensor,
        layout: Layout,
        after: Tensor,
        logits: LogitsChoice,
    ) -> Scoring:
        """Scores the text's labels `[batch, length]`, whose first token the prompt's last position predicts.

        Args:
            traits: of the model.
            call: the arguments of the call whose loss it is.
            labels: of the text.
            layout: with the prompts' columns before the text's.
            after: logits behind the rows' prompts, `[batch, vocabulary]`.
            logits: "all" or "labels".
        """
        is_text = layout.attention_mask[:, -labels.shape[1] :] != 0
        is_first = is_text & (is_text.cumsum(1) == 1)
        labels = labels.masked_fill(~is_text, -100)
        first = torch.where(is_first, labels, -100).amax(1).masked_fill(layout.prompt_lengths == 0, -100)
        scoring = cls._of(traits, call, _next(labels.masked_fill(is_first, -100)), logits)
        scoring.first = after, first
        return scoring

    @classmethod
    def _of(cls, traits: ModelTraits, call: Mapping[str, Any], targets: Tensor, logits: LogitsChoice) -> Scoring:
        positions = None
        if logits == "labels":
            rows, columns = (targets != -100).nonzero(as_tuple=True)
            positions, targets = (rows, columns), targets[rows, columns][None]
        return cls(traits, positions, targets, logits == "labels", call.get("num_items_in_batch"))

    @property
    def unwanted(self) -> set[str]:
        """Names of arguments that the model does not get, as what they ask for is computed here."""
        if self.targets is None:
            return set()
        return {"labels", "logits_to_keep"} if self.positions is not None else {"labels"}

    @property
    def scored_count(self) -> Tensor:
        """How many targets are scored."""
        assert self.targets is not None
        count = (self.targets != -100).sum()
        return count if self.first is None else count + (self.first[1] != -100).sum()

    def of_output(self, output: Any, substitution: Substitution) -> dict[str, Any]:
        """The loss, where it is computed here, and None for logits that are not wanted, by name."""
        found: dict[str, Any] = {"logits": None} if self.drops_logits else {}
        if self.targets is not None:
            count = self.scored_count if self.count is None else self.count
            hidden = substitution.hidden
            if hidden is None:
                found["loss"] = self._mean(substitution.select_logits(output.logits), self.targets, count)
            else:
                head = self.traits.model.get_output_embeddings()
                summed = summed_cross_entropy(hidden[0], head, self.targets[0])
                found["loss"] = summed / (count.to(summed.device) if isinstance(count, Tensor) else count)
            if self.first is not None:
                found["loss"] = found["loss"] + self._mean(*self.first, count)
            if self.earlier is not None:
                found["loss"] = self.earlier.mean_with(found["loss"], self.scored_count)
        return found

    def _mean(self, logits: Tensor, targets: Tensor, count: Any) -> Any:
        """The sum of the model's loss over `targets`, divided by `count`."""
        return self.traits.model.loss_function(
            logits=logits,
            labels=None,
            vocab_size=logits.shape[-1],
            shift_labels=targets,
            num_items_in_batch=count,
        )


def _next(labels: Tensor) -> Tensor:
    """What each column predicts."""
    return functional.pad(labels[:, 1:], (0, 1), value=-100)

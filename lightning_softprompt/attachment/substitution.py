"""What a pass substitutes: the output of the input embedding, and the input of the language-modelling head."""

from __future__ import annotations

import torch
from torch import Tensor


class Substitution:
    """One pass of the model over columns `[batch, width]`.

    Attributes:
        embeds: `[batch, width, hidden]`, what the input embedding is to put out; None once it has, or where ids stay
            as they are.
        keeps: bool `[batch, width]`, where the embedding's own output stays; None for nowhere.
        scored: rows and columns, int64 `[count]` each: the positions whose logits are wanted; None for all.
        holds_back: whether the head is to multiply nothing, as `hidden` is wanted in place of logits.
        hidden: what was held back, `[1, positions, hidden]`; None before.
        recomputes: whether the layers are to be computed again in the backward pass.
        owner: the attachment whose model runs.
        around: the pass that was under way in this thread when this one began.
    """

    def __init__(self, embeds: Tensor | None = None) -> None:
        self.recomputes = False
        self.owner: object = None
        self.around: Substitution | None = None
        self.embeds = embeds
        self.keeps: Tensor | None = None
        self.scored: tuple[Tensor, Tensor] | None = None
        self.holds_back = False
        self.hidden: Tensor | None = None
        self._head_has_selected = False

    def replace_embeddings(self, output: Tensor) -> Tensor:
        """The laid-out embeddings, in place of the first look-up of the ids that the model was given."""
        if self.embeds is None:
            return output
        if output.ndim == 3 and len(output) == len(self.embeds) and output.shape[1] > self.embeds.shape[1]:
            # Reformer widens its rows to a multiple of its chunks.
            embeds, self.embeds = self.embeds, None
            return torch.cat([embeds, output[:, embeds.shape[1] :]], dim=1)
        if output.shape[:-1].numel() != self.embeds.shape[:-1].numel():
            return output
        embeds, self.embeds = self.embeds, None
        if self.keeps is not None:
            return torch.where(self.keeps[..., None], output, embeds)
        if output.ndim == 3 and output.shape[:2] != embeds.shape[:2] and output.shape[1::-1] == embeds.shape[:2]:
            return embeds.transpose(0, 1)  # XLNet looks its ids up column by column
        return embeds.view_as(output)

    def select_hidden(self, hidden: Tensor) -> Tensor:
        """The hidden states at the scored positions, `[1, count, hidden]`: the head multiplies nothing else."""
        if self._head_has_selected or hidden.ndim != 3:
            return hidden
        if self.scored is not None:
            self._head_has_selected = True
            hidden = hidden[self.scored][None]
        if self.holds_back:
            self.hidden, hidden = hidden, hidden[:, :0]
        return hidden

    def select_logits(self, logits: Tensor) -> Tensor:
        """The logits at the scored positions, `[1, count, vocabulary]`, also where the head computed all of them."""
        if self.scored is None or self._head_has_selected:
            return logits
        return logits[self.scored][None]


def with_gradient(embeds: Tensor) -> Tensor:
    """Embeddings that ask for a gradient if any are recorded: else backward fails for a batch that trains no prompt."""
    if not torch.is_grad_enabled() or embeds.requires_grad:
        return embeds
    return embeds.detach().requires_grad_() * 1  # CTRL and GIT write into it, which no leaf of the graph allows

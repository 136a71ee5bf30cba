"""How prompts remember their base model: by its name, its width and a fingerprint of its embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_softprompt.base.embedding import look_up, vocabulary_size
from lightning_softprompt.base.support import check_has_weights
from lightning_softprompt.errors import SoftPromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 16
_COLUMNS = 8
# Loading the same weights as bfloat16 changes a value by up to 2^-8 of it; another model's embedding is unrelated.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class BaseModel:
    """A base model as prompts remember it.

    Attributes:
        name: its hub id or path; empty if it has none.
        hidden_size: width of the input embedding's output.
        ids: the token ids whose embeddings make up the fingerprint.
        fingerprint: the first 8 values of each of those embeddings, as the embedding module returns them.
    """

    name: str
    hidden_size: int
    ids: tuple[int, ...]
    fingerprint: tuple[float, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: tuple[int, ...] | None = None) -> BaseModel:
        """Describe `model` by the embeddings of `ids`, or of up to 16 ids among its first thousand if None.

        Raises:
            SoftPromptError: a model that does not have exactly one input embedding, or whose weights are not loaded.
        """
        embedding = model.get_input_embeddings()
        if not isinstance(embedding, nn.Module) or isinstance(embedding, nn.ModuleList):
            raise SoftPromptError(
                f"{type(model).__name__} has not one input embedding, but {type(embedding).__name__}; soft prompts "
                "stand in front of rows of one token a position"
            )
        check_has_weights(model)
        if ids is None:
            vocabulary = min(1000, vocabulary_size(model))
            ids = tuple(range(0, vocabulary, max(1, vocabulary // _ROWS)))[:_ROWS]
        with torch.no_grad():
            rows = look_up(embedding, torch.tensor([ids], device=next(embedding.parameters()).device))[0].float().cpu()
        values = rows[:, :_COLUMNS].flatten().tolist()
        name = str(getattr(model.config, "_name_or_path", "") or "")
        return cls(name, rows.shape[1], ids, tuple(float(f"{value:.5g}") for value in values))

    def is_same(self, other: BaseModel) -> bool:
        """Whether `other` has the same width and the same fingerprint, up to rounding. Names are not compared."""
        if (self.hidden_size, self.ids) != (other.hidden_size, other.ids):
            return False
        here, there = (torch.tensor(values, device="cpu") for values in (other.fingerprint, self.fingerprint))
        return len(here) == len(there) and bool((here - there).norm() <= _TOLERANCE * there.norm())

    def check(self, model: PreTrainedModel) -> None:
        """Raise a `SoftPromptError` if `model` is not this base model.

        The same weights in another dtype or at another path are the same model, and so is a model with a resized
        vocabulary, if that still has the fingerprint's ids.
        """
        knows_ids = max(self.ids, default=0) < vocabulary_size(model)
        if knows_ids and self.is_same(BaseModel.of(model, self.ids)):
            return
        name = str(getattr(model.config, "_name_or_path", "") or "") or type(model).__name__
        raise SoftPromptError(
            f"these prompts were made for another base model ({self.name or 'without a name'}, width "
            f"{self.hidden_size}) than {name}: the embeddings differ. Load that model; to try the prompts on this "
            "one all the same, in Python: prompts.base = None"
        )

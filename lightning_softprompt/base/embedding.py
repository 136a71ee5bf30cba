"""The input embedding of a model: looking up ids outside a forward pass, and the number of ids it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def look_up(embedding: nn.Module, ids: Tensor) -> Tensor:
    """The output of an input embedding for `ids`, computed outside a forward pass of its model.

    Weights that FSDP2 shards are gathered first, so every rank must call this function then.
    """
    whole = {name: weight.full_tensor() for name, weight in embedding.named_parameters() if isinstance(weight, DTensor)}
    return torch.func.functional_call(embedding, whole, (ids,)) if whole else embedding(ids)


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of ids that the input embedding can look up."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or model.config.get_text_config().vocab_size)

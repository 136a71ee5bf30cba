"""The input embedding: what it looks up, and how many ids it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def look_up(embedding: nn.Module, ids: Tensor) -> Tensor:
    """What an input embedding makes of `ids`, outside a pass of its model; of weights that FSDP2 shards, put together.

    Every rank has to call it then.
    """
    whole = {name: weight.full_tensor() for name, weight in embedding.named_parameters() if isinstance(weight, DTensor)}
    return torch.func.functional_call(embedding, whole, (ids,)) if whole else embedding(ids)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of ids the input embedding can be asked for."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or model.config.get_text_config().vocab_size)

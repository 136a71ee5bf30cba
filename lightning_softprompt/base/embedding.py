"""The input embedding: what it looks up, how many ids it knows, and which of them mean something beside text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def special_ids(model: PreTrainedModel, tokenizer: Any = None) -> set[int]:
    """Ids that mean something beside text: from the configurations and, where there is one, the tokenizer."""
    found: set[int] = set(getattr(tokenizer, "all_special_ids", None) or ())
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, list | tuple) else [value] if isinstance(value, int) else [])
    return found


def placeholder_id(model: PreTrainedModel) -> int:
    """An id for columns that hold no token: none that the model or a logits processor gives a meaning to."""
    special = special_ids(model)
    return next((id for id in range(vocabulary_size(model)) if id not in special), 0)

"""Special token ids, which mean something other than text, and the placeholder id, which means nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_softprompt.base.embedding import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def special_ids(model: PreTrainedModel, tokenizer: Any = None) -> set[int]:
    """The special ids (pad, end, begin, unknown, …) that the model's configurations and its tokenizer, if any, name."""
    found: set[int] = set(getattr(tokenizer, "all_special_ids", None) or ())
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, list | tuple) else [value] if isinstance(value, int) else [])
    return found


def placeholder_id(model: PreTrainedModel) -> int:
    """The smallest id that is not special, for columns that hold no token: the model gives it no other meaning."""
    special = special_ids(model)
    return next((id for id in range(vocabulary_size(model)) if id not in special), 0)

"""Between texts and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_softprompt.errors import SoftPromptError


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of an input, with what the tokenizer puts in front and without what it puts behind."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def encode_chat(tokenizer: Any, text: str, system: str | None = None) -> list[int]:
    """Ids of what a user says, in the tokenizer's chat template, up to where the assistant answers.

    Raises:
        SoftPromptError: a tokenizer without a chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise SoftPromptError(
            "the tokenizer has no chat template; take the tokenizer of an instruction-tuned model, or leave chat out"
        )
    says = [] if system is None else [{"role": "system", "content": system}]
    turns = [*says, {"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))


def encode_target(tokenizer: Any, target: str) -> list[int]:
    """Ids of what the model is to write, and nothing around them."""
    return list(tokenizer(target, add_special_tokens=False)["input_ids"])


def check_ids(ids: Sequence[int], vocabulary: int, what: str) -> None:
    """Raise a `SoftPromptError` where `what` has a token that an embedding of `vocabulary` ids cannot look up.

    Inside of the model it would be an IndexError, and on a GPU the end of the process.
    """
    unknown = [token for token in (max(ids, default=0), min(ids, default=0)) if not 0 <= token < vocabulary]
    if unknown:
        raise SoftPromptError(
            f"{what} has token {unknown[0]}, the model's embedding knows 0 to {vocabulary - 1}; take the model's own "
            "tokenizer, or make room with model.resize_token_embeddings(len(tokenizer)) and save the model"
        )


def decode_new(tokenizer: Any, sequences: Tensor, text_length: int, pad: int) -> list[str]:
    """The texts of the new tokens of what `generate` returned for inputs of `text_length` columns.

    What stands behind an answer that ended before the others is `pad`, which need not be special to the tokenizer.
    """
    rows = sequences[:, text_length:].tolist()
    for row in rows:
        while row and row[-1] == pad:
            row.pop()
    return tokenizer.batch_decode(rows, skip_special_tokens=True)

"""Turning texts into token ids, and token ids into texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_softprompt.base.guarded_text import encode_pieces
from lightning_softprompt.errors import SoftPromptError

# Texts in front of a target. Few tokenizers join its first character with more than one of them.
_FRONTS = (":", "a", "\n")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of an input text, with the tokens that the tokenizer puts in front and without an end-of-text token."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def encode_chat(tokenizer: Any, text: str, system: str | None = None) -> list[int]:
    """The ids of a chat in the tokenizer's chat template, up to the beginning of the assistant's answer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: what the user says; it may be `guarded`.
        system: what the system says; None adds no system message.

    Raises:
        SoftPromptError: a tokenizer without a chat template, or one that cannot take these messages.
    """
    return encode_turns(tokenizer, turns_of(text, system))


def turns_of(text: str, system: str | None) -> list[dict[str, str]]:
    """A chat of what the system says, if it says something, and what the user says."""
    says = [] if system is None else [{"role": "system", "content": system}]
    return [*says, {"role": "user", "content": text}]


def encode_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of any chat in the tokenizer's chat template, up to the beginning of the assistant's next answer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        turns: each with a "role" and a "content", which may be `guarded`.

    Raises:
        SoftPromptError: a tokenizer without a chat template, or one that cannot take these messages.
    """
    chat = write_turns(tokenizer, turns)
    return encode_pieces(
        chat, lambda piece: encode_alone(tokenizer, piece), lambda piece: encode_target(tokenizer, piece)
    )


def write_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> str:
    """The text of a chat in the tokenizer's chat template, whose ids `encode_turns` gives.

    Raises:
        SoftPromptError: a tokenizer without a chat template, or one that cannot take these messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise SoftPromptError(
            "the tokenizer has no chat template; take the tokenizer of an instruction-tuned model, or leave chat out"
        )
    try:
        return tokenizer.apply_chat_template([*turns], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a chat template is code of the base, and may raise anything
        told = " ".join(str(error).split()) or type(error).__name__
        if turns and turns[0]["role"] == "system" and _takes(tokenizer, turns[1:]):
            raise SoftPromptError(
                f"the tokenizer's chat template takes no words of the system ({told}); leave the system out, and write "
                "its words into the text of the template"
            ) from error
        raise SoftPromptError(f"the tokenizer's chat template cannot take these messages ({told})") from error


def _takes(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> bool:
    try:
        tokenizer.apply_chat_template([*turns], add_generation_prompt=True, tokenize=False)
    except Exception:
        return False
    return True


def encode_alone(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that stands by itself, without special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_target(tokenizer: Any, target: str) -> list[int]:
    """The ids of a text as it stands behind another one, without special tokens around it.

    Some tokenizers, as that of Llama 2, put a space or a start token in front of any text that is encoded alone. What
    the model is to write has neither: its ids are those that the text adds to a text in front of it.
    """
    alone = encode_alone(tokenizer, target)
    found: list[list[int]] = []
    for front in _FRONTS:
        head, whole = encode_alone(tokenizer, front), encode_alone(tokenizer, front + target)
        behind = whole[len(head) :]
        if whole[: len(head)] != head or not behind:  # the tokenizer joins the two
            continue
        if behind == alone or behind in found:
            return behind
        found.append(behind)
    return alone


def check_ids(ids: Sequence[int], vocabulary: int, what: str) -> None:
    """Raise a `SoftPromptError` if one of `ids` cannot be looked up in an embedding of `vocabulary` ids.

    Without this check the model would raise an IndexError on the CPU, and on a GPU the process would end. `what` names
    the text of the ids in the error.
    """
    wrong = next((token for token in ids if isinstance(token, bool) or not isinstance(token, int)), None)
    if wrong is not None:
        raise SoftPromptError(f"{what} must be a list of token ids, which are whole numbers; found {wrong!r} in it")
    unknown = [token for token in (max(ids, default=0), min(ids, default=0)) if not 0 <= token < vocabulary]
    if unknown:
        raise SoftPromptError(
            f"{what} has token {unknown[0]}, the model's embedding knows 0 to {vocabulary - 1}; take the model's own "
            "tokenizer, or make room with model.resize_token_embeddings(len(tokenizer)) and save the model"
        )


def decode_new(tokenizer: Any, sequences: Tensor, text_length: int, pad: int) -> list[str]:
    """The texts that `generate` wrote behind inputs of `text_length` columns; `sequences` is what it returned.

    The `pad` tokens behind an answer that ended before the others are removed here, because `pad` need not be one of
    the tokenizer's special tokens.
    """
    rows = sequences[:, text_length:].tolist()
    for row in rows:
        while row and row[-1] == pad:
            row.pop()
    return tokenizer.batch_decode(rows, skip_special_tokens=True)

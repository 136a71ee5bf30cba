"""Turning texts into token ids."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

from lightning_softprompt.base.guarded_text import guarded, pieces_of
from lightning_softprompt.errors import SoftPromptError

# Texts in front of a target. Few tokenizers join its first character with more than one of them.
_FRONTS = (":", "a", "\n")
# Marks where what is said in a turn begins and ends. Unicode keeps this character free, too.
_EDGE = "\ufdd1"


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of an input text, with the tokens that the tokenizer puts in front and without an end-of-text token.

    The text may be `guarded`.
    """
    first, *others = pieces_of(text)
    ids = list(tokenizer(first)["input_ids"])
    if others:
        place = _end_of(encode_alone(tokenizer, first), ids)
        ids[place:place] = _behind(tokenizer, others)
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _end_of(inner: list[int], ids: list[int]) -> int:
    """Where the ids of a text end among these with what the tokenizer puts around it."""
    size = len(inner)
    return next((at + size for at in range(len(ids) - size + 1) if ids[at : at + size] == inner), len(ids))


def encode_chat(
    tokenizer: Any, text: str, system: str | None = None, names: re.Pattern[str] | None = None
) -> list[int]:
    """The ids of a chat in the tokenizer's chat template, up to the beginning of the assistant's answer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: what the user says; it may be `guarded`.
        system: what the system says; None adds no system message.
        names: as in `encode_turns`.

    Raises:
        SoftPromptError: a tokenizer without a chat template, or one that cannot take these messages.
    """
    return encode_turns(tokenizer, turns_of(text, system), names)


def turns_of(text: str, system: str | None) -> list[dict[str, str]]:
    """A chat of what the system says, if it says something, and what the user says."""
    says = [] if system is None else [{"role": "system", "content": system}]
    return [*says, {"role": "user", "content": text}]


def encode_turns(tokenizer: Any, turns: Sequence[Mapping[str, str]], names: re.Pattern[str] | None = None) -> list[int]:
    """The ids of any chat in the tokenizer's chat template, up to the beginning of the assistant's next answer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        turns: each with a "role" and a "content", which may be `guarded`.
        names: the `token_names` that no content may complete together with the words of the chat template.

    Raises:
        SoftPromptError: a tokenizer without a chat template, or one that cannot take these messages.
    """
    chat = write_turns(tokenizer, turns)
    if names is not None:
        marked = write_turns(tokenizer, [{**turn, "content": _with_edges(turn["content"])} for turn in turns])
        if marked.replace(_EDGE, "") == chat.replace(_EDGE, ""):  # a chat template may look at where a content begins
            segments = marked.split(_EDGE)
            chat = guarded([part for words in segments for part in ((words, False), ("", True))][:-1], names)
    first, *others = pieces_of(chat)
    return [*encode_alone(tokenizer, first), *_behind(tokenizer, others)]


def _with_edges(content: str) -> str:
    """What is said in a turn, with marks around it, inside the spaces that a chat template may strip."""
    said = content.strip()
    before, _, after = content.partition(said) if said else (content, "", "")
    return f"{before}{_EDGE}{said}{_EDGE}{after}"


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
    """The ids of a text, which may be `guarded`, as it stands behind another one, without special tokens around it.

    Some tokenizers, as that of Llama 2, put a space or a start token in front of any text that is encoded alone. What
    the model is to write has neither: its ids are those that the text adds to a text in front of it.
    """
    return _behind(tokenizer, pieces_of(target))


def _behind(tokenizer: Any, pieces: Sequence[str]) -> list[int]:
    """The ids of pieces behind a text."""
    ids = ids_behind(tokenizer, {*pieces})
    return [token for piece in pieces for token in ids[piece]]


def ids_behind(tokenizer: Any, texts: Collection[str]) -> dict[str, list[int]]:
    """The ids of each text as it stands behind another one. All are encoded in a few calls of the tokenizer."""
    found = _encode_all(tokenizer, texts)
    candidates = {text: [ids] for text, ids in found.items()}  # two that are equal are right
    for front in _FRONTS:
        if not candidates:
            break
        fronts = _encode_all(tokenizer, [front, *(front + text for text in candidates)])
        head = fronts[front]
        for text, known in [*candidates.items()]:
            whole = fronts[front + text]
            behind = whole[len(head) :]
            if whole[: len(head)] != head or not behind:  # the tokenizer joins the two
                continue
            if behind in known:
                found[text] = behind
                del candidates[text]
            known.append(behind)
    return found


def _encode_all(tokenizer: Any, texts: Collection[str]) -> dict[str, list[int]]:
    """The ids of each text alone, as `encode_alone` gives them, at half of its cost where there are many."""
    listed, inner = [*texts], getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None and inner.truncation is None and inner.padding is None and not inner.encode_special_tokens:
        found = inner.encode_batch_fast(listed, add_special_tokens=False)
        return {text: list(each.ids) for text, each in zip(listed, found, strict=True)}
    return {text: encode_alone(tokenizer, text) for text in listed}


def check_ids(ids: Sequence[int], vocabulary: int, what: str) -> None:
    """Raise a `SoftPromptError` if one of `ids` cannot be looked up in an embedding of `vocabulary` ids.

    Without this check the model would raise an IndexError on the CPU, and on a GPU the process would end. `what` names
    the text of the ids in the error.
    """
    wrong = next((token for token in ids if isinstance(token, bool) or not isinstance(token, Integral)), None)
    if wrong is not None:
        raise SoftPromptError(f"{what} must be a list of token ids, which are whole numbers; found {wrong!r} in it")
    unknown = [token for token in (max(ids, default=0), min(ids, default=0)) if not 0 <= token < vocabulary]
    if unknown:
        raise SoftPromptError(
            f"{what} has token {unknown[0]}, the model's embedding knows 0 to {vocabulary - 1}; take the model's own "
            "tokenizer, or make room with model.resize_token_embeddings(len(tokenizer)) and save the model"
        )

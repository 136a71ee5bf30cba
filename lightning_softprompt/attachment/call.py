"""What a call whose rows have prompts may carry; anything else is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.attachment import caches
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.model_types import ATTENTIONS_BY_EAGER, NO_LOSS, reason
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError

TYPES_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
_LAID_OUT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", *TYPES_OF_TOKENS)
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_sequence_ids")


class Call:
    """What one forward call of an attached model carries. It is checked once, by `of`, and never changed.

    Args:
        arguments: all of them, by name.

    Attributes:
        arguments: as above.
        has_ids: whether the text is ids, not embeddings.
        text: ids, int64 `[batch, length]`, all of them known to the embedding, or embeddings,
            `[batch, length, hidden]`.
        mask: `[batch, columns]`, or None.
        labels: int64 `[batch, length]`, or None.
        positions: int64 `[batch or 1, length]`, or several kinds of them, `[kinds, batch or 1, length]`, or None.
        cache: by whichever name the model has it, or None.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.has_ids = arguments.get("input_ids") is not None
        self.text: Tensor = arguments["input_ids" if self.has_ids else "inputs_embeds"]
        self.mask: Tensor | None = arguments.get("attention_mask")
        self.labels: Tensor | None = arguments.get("labels")
        self.positions: Tensor | None = arguments.get("position_ids")
        self.cache = caches.find(arguments)

    @classmethod
    def of(cls, traits: ModelTraits, arguments: Mapping[str, Any]) -> Call:
        """Of arguments by name, which are checked.

        Raises:
            SoftPromptError: something that cannot be laid out.
        """
        text = _text(arguments)
        _check(traits.model, arguments, text)
        if not text.is_floating_point():
            arguments = {**arguments, "input_ids": valid_ids(traits, text, arguments.get("attention_mask"))}
        return cls(arguments)

    def of_rows(self, which: slice, **others: Any) -> Call:
        """Some of the rows, and other values of some arguments."""
        count = len(self.text)

        def part(name: str, value: Any) -> Any:
            if name == "position_ids" and isinstance(value, Tensor):
                return value if value.shape[-2] == 1 else value[..., which, :]
            return value[which] if isinstance(value, Tensor) and value.ndim and len(value) == count else value

        return Call({name: part(name, value) for name, value in self.arguments.items()} | others)


def named(names: Sequence[str], args: Sequence[Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments by name.

    Raises:
        SoftPromptError: too many of them, or one that is among `others`, too.
    """
    twice = [name for name in names[: len(args)] if name in others]
    if len(args) > len(names) or twice:
        what = f"{twice[0]!r} is given twice" if twice else f"{len(args)} positional arguments for {len(names)} names"
        raise SoftPromptError(f"forward() cannot take these arguments, {what}; give each one once, by its name")
    return dict(zip(names, args, strict=False))


def row_count(arguments: Mapping[str, Any]) -> int | None:
    """How many rows a call has, of ids or embeddings; None where it has neither."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(arguments.get(name), Tensor):
            return len(arguments[name])
    return None


def valid_ids(traits: ModelTraits, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Ids of a text, with a placeholder for pads that the embedding does not know.

    A tokenizer's pad token is often added after the model was made. Nothing reads what stands at a pad, but the
    embedding looks it up all the same.

    Raises:
        SoftPromptError: another id that the embedding does not know; on the CPU alone, as no pass waits for a device
            to tell.
    """
    known = vocabulary_size(traits.model)
    if mask is not None and mask.shape == ids.shape:
        ids = ids.masked_fill((mask == 0) & ((ids < 0) | (ids >= known)), traits.placeholder)
    if ids.device.type == "cpu" and ids.numel() and (int(ids.max()) >= known or int(ids.min()) < 0):
        found = int(ids.max()) if int(ids.max()) >= known else int(ids.min())
        raise SoftPromptError(
            f"the input has token id {found}, and the embedding of {type(traits.model).__name__} knows the ids from 0 "
            f"to {known - 1}; take the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) "
            "before the prompts are made"
        )
    return ids


def _text(call: Mapping[str, Any]) -> Tensor:
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise SoftPromptError("pass exactly one of input_ids [batch, length] and inputs_embeds [batch, length, hidden]")
    text = ids if ids is not None else embeds
    assert text is not None
    rank = 2 if ids is not None else 3
    if text.ndim != rank:
        form = "input_ids must be [batch, length]" if rank == 2 else "inputs_embeds must be [batch, length, hidden]"
        raise SoftPromptError(f"{form}, got {list(text.shape)}")
    if not text.shape[1]:
        raise SoftPromptError("the input has no columns; every row needs at least one token of text")
    return text


def _check(model: Any, call: Mapping[str, Any], text: Tensor) -> None:
    rows, length = text.shape[:2]
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != rows):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SoftPromptError(
            f"attention_mask must be [batch, length], zeros at pads, so that prompts can be put in; got {found}. "
            "Masks of four dimensions and packed sequences are not supported: pad the rows instead"
        )
    is_empty = caches.remembered(caches.find(call)) is None
    if is_empty and mask is not None and mask.shape[1] != length:
        raise SoftPromptError(f"attention_mask must be [{rows}, {length}] like the input, got {list(mask.shape)}")
    for name in ("labels", *TYPES_OF_TOKENS):
        if call.get(name) is not None and call[name].shape != (rows, length):
            raise SoftPromptError(f"{name} must be [{rows}, {length}] like the input, got {list(call[name].shape)}")
    _check_positions(call.get("position_ids"), mask, rows, length)
    _check_exceptions(model, call)
    for name, value in call.items():
        if value is None or name in _LAID_OUT:
            continue
        if name in _PACKED:
            raise SoftPromptError(
                f"{name} marks packed sequences, which have no row to put a prompt before; pad the rows"
            )
        if isinstance(value, Tensor) and value.ndim in (2, 3) and tuple(value.shape[:2]) == (rows, length):
            raise SoftPromptError(
                f"{type(model).__name__} was given {name} {list(value.shape)}, one value a text column; what stands at "
                "a prompt's columns is not defined. Leave it out"
            )


def _check_exceptions(model: Any, call: Mapping[str, Any]) -> None:
    """Raise a `SoftPromptError` for what this type of model does not do, with prompts, as others do."""
    name = type(model).__name__
    if call.get("labels") is not None and (why := reason(NO_LOSS, model.config)):
        raise SoftPromptError(f"{name} takes no labels of rows with prompts: {why}; leave them out")
    is_eager = model.config._attn_implementation == "eager"
    if call.get("output_attentions") and not is_eager and (why := reason(ATTENTIONS_BY_EAGER, model.config)):
        raise SoftPromptError(f"{name} gives no attentions: {why}; load it with attn_implementation='eager'")
    if call.get("ignore_index", -100) != -100:
        raise SoftPromptError(
            f"ignore_index={call['ignore_index']} would score prompts and pads, whose labels are -100; give -100 to "
            "the labels that are not to be scored, and leave it out"
        )
    kinds = call.get("mm_token_type_ids")
    if kinds is not None and bool(kinds.any()):
        raise SoftPromptError(
            f"mm_token_type_ids of {name} mark images or sounds, whose positions a prompt would move; give it text "
            "alone"
        )


def _check_positions(positions: Tensor | None, mask: Tensor | None, rows: int, length: int) -> None:
    if positions is None:
        return
    if positions.ndim not in (2, 3) or positions.shape[-2] not in (1, rows) or positions.shape[-1] != length:
        raise SoftPromptError(f"position_ids must be [{rows}, {length}] like the input, got {list(positions.shape)}")
    if length == 1:  # a decoding step: nothing to compare, and no reason to wait for the device
        return
    restarts = positions[..., 1:] < positions[..., :-1]
    if mask is not None and mask.shape[1] == length:
        restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if bool(torch.any(restarts)):
        raise SoftPromptError(
            "position_ids restart inside a row, which marks packed sequences; a prompt goes before a row. Pad the rows"
        )

"""What a call of an attached model may carry; anything else is refused by name, never ignored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.attachment import caches
from lightning_softprompt.errors import SoftPromptError

_LAID_OUT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_sequence_ids")


def input_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The ids or embeddings that a call of `generate` is given."""
    given = args[0] if args else None
    for name in ("inputs", "input_ids", "inputs_embeds"):
        given = kwargs.get(name) if given is None else given
    return given


def check_generation(options: dict[str, Any], config: Any) -> None:
    """Raise a `SoftPromptError` for a way of generating that prompts have no part in."""
    scale = options.get("guidance_scale", getattr(config, "guidance_scale", None))
    if scale is not None and scale != 1:
        raise SoftPromptError(
            f"guidance_scale={scale} compares the text with a shorter one, which would get the prompt too; leave it out"
        )


def new_columns(options: dict[str, Any], config: Any, length: int) -> int:
    """How many columns `generate` adds at most to a text of `length`, as far as its options tell; else its default."""
    found = {name: options.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length")}
    if found["max_new_tokens"] is not None:
        return int(found["max_new_tokens"])
    return 20 if found["max_length"] is None else max(int(found["max_length"]) - length, 0)


def check_inputs(model: nn.Module, call: dict[str, Any]) -> None:
    """Raise a `SoftPromptError` where a call holds something that cannot be laid out."""
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise SoftPromptError("pass exactly one of input_ids [batch, length] and inputs_embeds [batch, length, hidden]")
    text = ids if ids is not None else embeds
    assert text is not None
    rank = 2 if ids is not None else 3
    if text.ndim != rank:
        form = "input_ids must be [batch, length]" if rank == 2 else "inputs_embeds must be [batch, length, hidden]"
        raise SoftPromptError(f"{form}, got {list(text.shape)}")
    rows, length = text.shape[:2]
    if not length:
        raise SoftPromptError("the input has no columns; every row needs at least one token of text")
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != rows):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SoftPromptError(
            f"attention_mask must be [batch, length], zeros at pads, so that prompts can be put in; got {found}. "
            "Masks of four dimensions and packed sequences are not supported: pad the rows instead"
        )
    if caches.find(call) is None and mask is not None and mask.shape[1] != length:
        raise SoftPromptError(f"attention_mask must be [{rows}, {length}] like the input, got {list(mask.shape)}")
    labels = call.get("labels")
    if labels is not None and labels.shape != text.shape[:2]:
        raise SoftPromptError(f"labels must be [{rows}, {length}] like the input, got {list(labels.shape)}")
    _check_positions(call.get("position_ids"), mask, rows, length)
    for name, value in call.items():
        if value is None or name in _LAID_OUT:
            continue
        if name in _PACKED:
            raise SoftPromptError(
                f"{name} marks packed sequences, which have no row to put a prompt before; pad the rows"
            )
        if isinstance(value, Tensor) and value.ndim >= 2 and tuple(value.shape[:2]) == (rows, length):
            raise SoftPromptError(
                f"{type(model).__name__} was given {name} {list(value.shape)}, one value a text column; what stands at "
                "a prompt's columns is not defined. Leave it out"
            )


def _check_positions(positions: Tensor | None, mask: Tensor | None, rows: int, length: int) -> None:
    if positions is None:
        return
    if positions.ndim != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != length:
        raise SoftPromptError(f"position_ids must be [{rows}, {length}] like the input, got {list(positions.shape)}")
    if length == 1:  # a decoding step: nothing to compare, and no reason to wait for the device
        return
    restarts = positions[:, 1:] < positions[:, :-1]
    if mask is not None and mask.shape[1] == length:
        restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if bool(torch.any(restarts)):
        raise SoftPromptError(
            "position_ids restart inside a row, which marks packed sequences; a prompt goes before a row. Pad the rows"
        )

"""The Triton kernel of the prompt concatenation, and its launcher.

The kernel clamps the values it reads (task ids, offsets, token ids), so that no value makes it read or write outside a
tensor. Offsets into tensors are 64-bit. The host passes all shapes, so nothing waits for the device.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCAN_BLOCK = 512  # number of columns of a mask that are read at once
_QUERY_BLOCK, _KEY_BLOCK = 16, 256  # queries and keys in a tile of the expanded mask
TILE_ELEMENTS = 4096  # number of elements of `inputs_embeds` that one program writes

_VALUES = ["length", "max_prompt_length", "tasks", "prompt_rows", "vocab", "embedding_programs", "programs_per_row"]


@triton.jit
def _find_first(row, attention_mask, length, SCAN_BLOCK: tl.constexpr):
    """The first column of a row whose mask is set; `length` if no column's is."""
    # Most rows begin with text, and then only one column of the mask is read.
    first = tl.where(tl.load(attention_mask + row * length, mask=length > 0, other=0) != 0, 0, length)
    column = 0
    while (first == length) & (column < length):
        columns = column + tl.arange(0, SCAN_BLOCK)
        mask = tl.load(attention_mask + row * length + columns, mask=columns < length, other=0)
        first = tl.min(tl.where(mask != 0, columns, length), 0)
        column += SCAN_BLOCK
    return first


@triton.jit
def _find_prompt(row, offsets, task_ids, tasks, prompt_rows, max_prompt_length):
    """The place of the row's prompt in the packed prompts: its first prompt row and its length."""
    task = tl.load(task_ids + row)
    has_prompt = (task >= 0) & (task < tasks)
    begin = tl.load(offsets + task, mask=has_prompt, other=0)
    end = tl.load(offsets + task + 1, mask=has_prompt, other=0)
    begin = tl.maximum(begin, 0)
    prompt_length = tl.minimum(tl.maximum(tl.minimum(end, prompt_rows) - begin, 0), max_prompt_length)
    return begin, prompt_length.to(tl.int32)


@triton.jit
def _locate(columns, start, prompt_length, first, length):
    """What columns hold: their prompt row, whether they hold a prompt, their text column, whether they hold text.

    The columns of masked text count as text here.
    """
    position = columns - start
    source = position - prompt_length + first
    return (
        position,
        (position >= 0) & (position < prompt_length),
        source,
        (position >= prompt_length) & (source < length),
    )


@triton.jit
def _mask_of(row, columns, start, prompt_length, first, attention_mask, length):
    """The laid-out mask at `columns`: 1 on the prompt, and the given mask on the text."""
    _, in_prompt, source, in_text = _locate(columns, start, prompt_length, first, length)
    if attention_mask is not None:
        mask = tl.load(attention_mask + row * length + source, mask=in_text, other=0)
    else:
        mask = in_text.to(tl.int64)
    return tl.where(in_prompt, 1, mask)


@triton.jit
def _write_integers(
    row, start, prompt_length, first, attention_mask, labels, out_mask, out_positions, out_labels, length, width,
    WRITES_MASK: tl.constexpr, SCAN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one row's mask, positions and labels from left to right, while counting its unmasked columns."""
    before = 0
    for column in range(0, width, SCAN_BLOCK):
        columns = column + tl.arange(0, SCAN_BLOCK)
        inside = columns < width
        mask = _mask_of(row, columns, start, prompt_length, first, attention_mask, length)
        is_real = (mask != 0).to(tl.int32)
        count = before + tl.cumsum(is_real, 0)
        before += tl.sum(is_real, 0)
        if WRITES_MASK:
            tl.store(out_mask + row * width + columns, mask.to(out_mask.dtype.element_ty), mask=inside)
        tl.store(out_positions + row * width + columns, tl.maximum(count - 1, 0).to(tl.int64), mask=inside)
        if labels is not None:
            _, _, source, in_text = _locate(columns, start, prompt_length, first, length)
            # No token predicts the first unmasked column of a row.
            is_scored = in_text & (mask != 0) & (count > 1)
            label = tl.load(labels + row * length + source, mask=is_scored, other=-100)
            tl.store(out_labels + row * width + columns, label, mask=inside)


@triton.jit
def _write_embeddings(
    tile, row, begin, start, prompt_length, first, embeddings, input_ids, prompts, inputs_embeds, length, width, vocab,
    HIDDEN: tl.constexpr, COLUMN_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a tile `[columns, hidden]` of one row. Every element is read once, from the prompt or from the text.

    Columns are counted from the tile's first one in 32 bits. A tile without a prompt branches past its loads.
    """
    HIDDEN_TILES: tl.constexpr = (HIDDEN + HIDDEN_BLOCK - 1) // HIDDEN_BLOCK
    column = (tile // HIDDEN_TILES) * COLUMN_BLOCK
    step = tl.arange(0, COLUMN_BLOCK)
    hidden = ((tile % HIDDEN_TILES) * HIDDEN_BLOCK + tl.arange(0, HIDDEN_BLOCK))[None, :]
    _, in_prompt, source, in_text = _locate(column + step, start, prompt_length, first, length)
    inside, reads_text, reads_prompt = (column + step < width)[:, None], in_text[:, None], in_prompt[:, None]
    if HIDDEN % HIDDEN_BLOCK != 0:
        exists = hidden < HIDDEN
        inside, reads_text, reads_prompt = inside & exists, reads_text & exists, reads_prompt & exists
    if input_ids is not None:
        text_row = tl.load(input_ids + row * length + source, mask=in_text, other=0)
        text_row = tl.minimum(tl.maximum(text_row, 0), vocab - 1)
        at_text = embeddings + text_row[:, None] * HIDDEN + hidden
    else:
        text_row = row * length + column - start - prompt_length + first
        at_text = embeddings + text_row * HIDDEN + (step[:, None] * HIDDEN + hidden)
    value = tl.load(at_text, mask=reads_text, other=0.0)
    if (column < start + prompt_length) & (column + COLUMN_BLOCK > start):
        at = prompts + (begin + (column - start)) * HIDDEN + (step[:, None] * HIDDEN + hidden)
        prompt = tl.load(at, mask=reads_prompt, other=0.0)
        value = tl.where(in_prompt[:, None], prompt.to(value.dtype), value)
    tl.store(inputs_embeds + (row * width + column) * HIDDEN + (step[:, None] * HIDDEN + hidden), value, mask=inside)


@triton.jit
def _write_causal_mask(
    tile, row, start, prompt_length, first, attention_mask, out_mask, length, width,
    LOWEST: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the mask of some queries of one row for all keys.

    It is True or 0 where a query sees a key, and False or LOWEST where it does not.
    """
    queries = (tile * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK))[:, None]
    for key in range(0, width, KEY_BLOCK):
        keys = key + tl.arange(0, KEY_BLOCK)
        mask = _mask_of(row, keys, start, prompt_length, first, attention_mask, length)
        keys = keys[None, :]
        sees = (keys <= queries) & (mask != 0)[None, :]
        value = sees.to(tl.int8) if LOWEST is None else tl.where(sees, 0.0, LOWEST)
        at = out_mask + (row * width + queries) * width + keys
        tl.store(at, value.to(out_mask.dtype.element_ty), mask=(queries < width) & (keys < width))


@triton.jit(do_not_specialize=_VALUES)
def concat_kernel(
    embeddings, input_ids, prompts, offsets, task_ids, attention_mask, labels,
    inputs_embeds, out_mask, out_positions, out_labels, spans,
    length, max_prompt_length, tasks, prompt_rows, vocab, embedding_programs, programs_per_row,
    IS_LEFT: tl.constexpr, MASK_FORM: tl.constexpr, LOWEST: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
    SCAN_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the whole layout.

    Of the programs of a row, the first writes mask, positions and labels, the next write the embeddings, and the last
    write the causal mask, if one is asked for.
    """
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    part = tl.program_id(0) % programs_per_row
    width = max_prompt_length + length
    begin, prompt_length = _find_prompt(row, offsets, task_ids, tasks, prompt_rows, max_prompt_length)
    first = 0
    if attention_mask is not None:
        first = _find_first(row, attention_mask, length, SCAN_BLOCK)
    start = 0
    if IS_LEFT:
        start = max_prompt_length + first - prompt_length
    if part == 0:
        tl.store(spans + row * 3, (start + tl.zeros((), tl.int32)).to(tl.int64))
        tl.store(spans + row * 3 + 1, (start + prompt_length).to(tl.int64))
        tl.store(spans + row * 3 + 2, (first + tl.zeros((), tl.int32)).to(tl.int64))
        _write_integers(
            row, start, prompt_length, first, attention_mask, labels, out_mask, out_positions, out_labels,
            length, width, MASK_FORM == "padding", SCAN_BLOCK,
        )  # fmt: skip
    elif part <= embedding_programs:
        _write_embeddings(
            part - 1, row, begin, start, prompt_length, first, embeddings, input_ids, prompts, inputs_embeds,
            length, width, vocab, HIDDEN, COLUMN_BLOCK, HIDDEN_BLOCK,
        )  # fmt: skip
    elif MASK_FORM != "padding":
        _write_causal_mask(
            part - 1 - embedding_programs, row, start, prompt_length, first, attention_mask, out_mask,
            length, width, LOWEST, QUERY_BLOCK, KEY_BLOCK,
        )  # fmt: skip


class Concatenated(NamedTuple):
    """The outputs of `concat`, whose docstring describes `labels` and `spans`."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    spans: Tensor


def concat(
    embeddings: Tensor,
    input_ids: Tensor | None,
    prompts: Tensor,
    offsets: Tensor,
    task_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    is_left: bool,
    max_prompt_length: int,
    mask_form: str,
) -> Concatenated:
    """Launch the one kernel of the layout. `softprompt_kernels.prompt_concat` describes and checks the arguments.

    Returns:
        The outputs of the layout. `labels` is `[0]` if none were given. `spans` is int64 `[batch, 3]`: for each row the
        column where its prompt starts, the column behind the prompt's end, and the first text column that is kept.
    """
    out = outputs(embeddings, input_ids, attention_mask, labels, max_prompt_length, mask_form)
    batch, width, hidden = out.inputs_embeds.shape
    if not batch:
        return out
    column_block, hidden_block = tile_of(hidden, TILE_ELEMENTS)
    embedding_programs = triton.cdiv(width, column_block) * triton.cdiv(hidden, hidden_block)
    mask_programs = 0 if mask_form == "padding" else triton.cdiv(width, _QUERY_BLOCK)
    programs_per_row = 1 + embedding_programs + mask_programs
    with on_device_of(embeddings):
        concat_kernel[(batch * programs_per_row,)](
            dense(embeddings), dense(input_ids), dense(prompts), dense(offsets), dense(task_ids),
            _bytes(dense(attention_mask)), dense(labels),
            out.inputs_embeds, _bytes(out.attention_mask), out.position_ids, out.labels, out.spans,
            width - max_prompt_length, max_prompt_length, offsets.shape[0] - 1, prompts.shape[0], embeddings.shape[0],
            embedding_programs, programs_per_row,
            IS_LEFT=is_left, MASK_FORM=mask_form,
            LOWEST=torch.finfo(embeddings.dtype).min if mask_form == "additive" else None, HIDDEN=hidden,
            COLUMN_BLOCK=column_block, HIDDEN_BLOCK=hidden_block,
            SCAN_BLOCK=_SCAN_BLOCK, QUERY_BLOCK=_QUERY_BLOCK, KEY_BLOCK=_KEY_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def outputs(
    embeddings: Tensor,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    max_prompt_length: int,
    mask_form: str,
) -> Concatenated:
    """The tensors that `concat` writes to, with memory that is not initialized."""
    batch, length = embeddings.shape[:2] if input_ids is None else input_ids.shape
    width = max_prompt_length + length
    if mask_form == "padding":
        mask = embeddings.new_empty(batch, width, dtype=torch.int64 if attention_mask is None else attention_mask.dtype)
    else:
        dtype = torch.bool if mask_form == "boolean" else embeddings.dtype
        mask = embeddings.new_empty(batch, 1, width, width, dtype=dtype)
    return Concatenated(
        inputs_embeds=embeddings.new_empty(batch, width, embeddings.shape[-1]),
        attention_mask=mask,
        position_ids=embeddings.new_empty(batch, width, dtype=torch.int64),
        labels=embeddings.new_empty(0 if labels is None else (batch, width), dtype=torch.int64),
        spans=embeddings.new_empty(batch, 3, dtype=torch.int64),
    )


def tile_of(hidden: int, elements: int) -> tuple[int, int]:
    """The number of columns and of hidden elements in a tile, both powers of two.

    If possible, the number of hidden elements divides the hidden size.
    """
    divisor = hidden & -hidden
    hidden_block = divisor if divisor >= 64 else triton.next_power_of_2(hidden)
    hidden_block = min(hidden_block, 1024, elements)
    return elements // hidden_block, hidden_block


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself if it is contiguous in memory, else a contiguous copy; None stays None."""
    return None if tensor is None else tensor.contiguous()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels launch on the tensor's device, which need not be the current device."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def _bytes(mask: Tensor | None) -> Tensor | None:
    """The mask with bool viewed as uint8, because Triton has no pointers to bool."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask

"""The Triton kernels of the prompt concatenation's gradients. They use no atomics, so two runs are equal to the bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_kernels.triton_concat import TILE_ELEMENTS, dense, on_device_of, tile_of

# Sizes of a program that sums, which has one warp. These were the fastest of nine on an H200, taken over all sizes.
_ROW_BLOCK, _HIDDEN_BLOCK = 64, 512  # rows of the batch that it looks up at once, and hidden elements that it sums
_LOADS = 4  # number of rows' gradients that it loads at once
_SPLIT_ROWS = 64  # smallest number of rows of the batch in one part of a split sum
_ENOUGH_PROGRAMS = 2048  # number of programs that fill a large GPU; with fewer, sums over many rows are split

_VALUES = ["batch", "length", "width", "tasks", "prompt_rows", "rows_per_split"]


@triton.jit(do_not_specialize=_VALUES)
def _prompt_gradient_kernel(
    gradient, spans, offsets, task_ids, sums, batch, width, tasks, prompt_rows, rows_per_split,
    HIDDEN: tl.constexpr, HIDDEN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, TASK_BLOCK: tl.constexpr,
    LOADS: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of some hidden elements of one packed prompt row over the batch's rows of its task.

    Rows of other tasks cost a comparison, and no load.
    """
    HIDDEN_TILES: tl.constexpr = (HIDDEN + HIDDEN_BLOCK - 1) // HIDDEN_BLOCK
    program = tl.program_id(0)
    hidden = (program % HIDDEN_TILES) * HIDDEN_BLOCK + tl.arange(0, HIDDEN_BLOCK)
    prompt_row = (program // HIDDEN_TILES) % prompt_rows
    split = program // HIDDEN_TILES // prompt_rows
    task = 0
    for block in range(0, tasks, TASK_BLOCK):
        others = block + tl.arange(0, TASK_BLOCK)
        ends = tl.load(offsets + 1 + others, mask=others < tasks, other=9223372036854775807)
        task += tl.sum((ends <= prompt_row).to(tl.int32), 0)
    position = prompt_row - tl.load(offsets + task, mask=task < tasks, other=9223372036854775807)
    total = tl.zeros((HIDDEN_BLOCK,), tl.float32)
    end = tl.minimum((split + 1) * rows_per_split, batch)
    for block in range(split * rows_per_split, end, ROW_BLOCK):
        rows = block + tl.arange(0, ROW_BLOCK)
        of_task = tl.load(task_ids + rows, mask=rows < end, other=-1) == task
        start = tl.load(spans + rows * 3, mask=of_task, other=0)
        stop = tl.load(spans + rows * 3 + 1, mask=of_task, other=0)
        column = start + position
        in_prompt = (of_task & (column >= start) & (column < stop)).to(tl.int32)
        number = tl.cumsum(in_prompt, 0) - in_prompt  # of the task's rows before this one
        at = (rows.to(tl.int64) * width + column) * in_prompt
        count = tl.sum(in_prompt, 0)
        for summed in range(0, count, LOADS):
            for step in tl.static_range(LOADS):
                at_row = tl.sum(tl.where((number == summed + step) & (in_prompt > 0), at, 0), 0)
                exists = hidden < tl.where(summed + step < count, HIDDEN, 0)
                total += tl.load(gradient + at_row * HIDDEN + hidden, mask=exists, other=0.0).to(tl.float32)
    tl.store(sums + (split * prompt_rows + prompt_row).to(tl.int64) * HIDDEN + hidden, total, mask=hidden < HIDDEN)


@triton.jit(do_not_specialize=_VALUES)
def _text_gradient_kernel(
    gradient, spans, text_gradient, length, width,
    HIDDEN: tl.constexpr, COLUMN_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile `[text columns, hidden]` of one row; 0 for columns that the layout dropped."""
    HIDDEN_TILES: tl.constexpr = (HIDDEN + HIDDEN_BLOCK - 1) // HIDDEN_BLOCK
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(length, COLUMN_BLOCK) * HIDDEN_TILES
    row = program // tiles
    tile = program % tiles
    columns = (tile // HIDDEN_TILES) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    hidden = ((tile % HIDDEN_TILES) * HIDDEN_BLOCK + tl.arange(0, HIDDEN_BLOCK))[None, :]
    first = tl.load(spans + row * 3 + 2)
    laid_out = columns - first + tl.load(spans + row * 3 + 1)
    inside = (columns < length)[:, None]
    stands = ((columns >= first) & (laid_out < width))[:, None] & inside
    at = gradient + (row * width + laid_out)[:, None] * HIDDEN + hidden
    value = tl.load(at, mask=stands & (hidden < HIDDEN), other=0.0)
    at = text_gradient + (row * length + columns)[:, None] * HIDDEN + hidden
    tl.store(at, value, mask=inside & (hidden < HIDDEN))


def prompt_gradient(gradient: Tensor, spans: Tensor, offsets: Tensor, task_ids: Tensor, prompt_rows: int) -> Tensor:
    """Sum the gradient of `inputs_embeds` over the rows of each task: float32 `[prompt_rows, hidden]`.

    One program sums an element, in an order that depends only on the shapes. If there are few prompt rows and many
    rows in the batch, several programs sum parts of it first. A gradient that is not contiguous is copied once.
    """
    batch, width, hidden = gradient.shape
    if not batch or not prompt_rows:
        return gradient.new_zeros(prompt_rows, hidden, dtype=torch.float32)
    programs = prompt_rows * triton.cdiv(hidden, _HIDDEN_BLOCK)
    splits = max(1, min(triton.cdiv(batch, _SPLIT_ROWS), _ENOUGH_PROGRAMS // programs))
    rows_per_split = triton.cdiv(triton.cdiv(batch, splits), _ROW_BLOCK) * _ROW_BLOCK
    sums = gradient.new_empty(splits, prompt_rows, hidden, dtype=torch.float32)
    with on_device_of(gradient):
        _prompt_gradient_kernel[(programs * splits,)](
            gradient.contiguous(), spans, dense(offsets), dense(task_ids), sums,
            batch, width, offsets.shape[0] - 1, prompt_rows, rows_per_split,
            HIDDEN=hidden, HIDDEN_BLOCK=_HIDDEN_BLOCK, ROW_BLOCK=_ROW_BLOCK, TASK_BLOCK=64,
            LOADS=_LOADS, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return sums[0] if splits == 1 else sums.sum(0)


def text_gradient(gradient: Tensor, spans: Tensor, length: int) -> Tensor:
    """The gradient of `inputs_embeds` at the text's columns: `[batch, length, hidden]`, 0 for dropped pads."""
    batch, width, hidden = gradient.shape
    result = gradient.new_empty(batch, length, hidden)
    if not batch or not length:
        return result
    column_block, hidden_block = tile_of(hidden, TILE_ELEMENTS)
    with on_device_of(gradient):
        _text_gradient_kernel[(batch * triton.cdiv(length, column_block) * triton.cdiv(hidden, hidden_block),)](
            gradient.contiguous(), spans, result, length, width,
            HIDDEN=hidden, COLUMN_BLOCK=column_block, HIDDEN_BLOCK=hidden_block, enable_fp_fusion=False,
        )  # fmt: skip
    return result

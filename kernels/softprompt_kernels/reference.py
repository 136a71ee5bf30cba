"""The prompt concatenation in plain torch: the CPU path, the oracle and the baseline of every other backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED_LABEL = -100


class PromptConcat(NamedTuple):
    """What a model reads after its rows were laid out.

    Attributes:
        inputs_embeds: `[batch, width, hidden]`, the embeddings' dtype; pads are zeros.
        attention_mask: `[batch, width]`, the given mask's dtype, int64 where none was given.
        position_ids: int64 `[batch, width]`: `cumsum(mask) - 1`, clamped at 0.
        labels: int64 `[batch, width]`, -100 on prompts and pads; None where none were given.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


class _Columns(NamedTuple):
    """What each column of the laid-out batch holds: `[batch, width]` where not said otherwise."""

    in_prompt: Tensor
    in_text: Tensor
    prompt_row: Tensor  # of the packed prompts, [batch, max_prompt_length]
    place: Tensor  # within the row's own prompt
    source: Tensor  # the text column
    is_predicted: Tensor  # something stands before it


def prompt_concat_reference(
    text: Tensor,
    prompts: Tensor,
    offsets: Tensor,
    task_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None,
    *,
    padding_side: str,
    max_prompt_length: int,
) -> PromptConcat:
    """Lay out rows as `pads | prompt | text` or `prompt | text | pads`; see `softprompt_kernels.prompt_concat`.

    `text` is `[batch, length, hidden]`, ready embeddings; arguments are not checked here.
    """
    columns = _columns(offsets, task_ids, attention_mask, padding_side, max_prompt_length)
    inputs_embeds = _embeddings(text, prompts, columns)
    mask = _gather_text(attention_mask, columns).masked_fill(~columns.in_text, 0).masked_fill(columns.in_prompt, 1)
    position_ids = ((mask != 0).cumsum(1) - 1).clamp(min=0)
    if labels is not None:
        is_scored = columns.in_text & (mask != 0) & columns.is_predicted
        labels = _gather_text(labels, columns).masked_fill(~is_scored, IGNORED_LABEL)
    return PromptConcat(inputs_embeds, mask, position_ids, labels)


def _columns(
    offsets: Tensor, task_ids: Tensor, attention_mask: Tensor, padding_side: str, max_prompt_length: int
) -> _Columns:
    length, device = attention_mask.shape[1], attention_mask.device
    task = task_ids.clamp(min=0)
    # A last empty task lets rows without a prompt read a length even where there is no task at all.
    bounds = torch.cat([offsets, offsets[-1:]])
    prompt_length = torch.where(task_ids >= 0, bounds[task + 1] - bounds[task], 0)[:, None]
    # Leading pads: the columns before which nothing was real yet. All of them in a row without text.
    first = ((attention_mask != 0).cumsum(1) == 0).sum(1)[:, None]
    start = max_prompt_length + first - prompt_length if padding_side == "left" else torch.zeros_like(first)
    place = torch.arange(max_prompt_length + length, device=device) - start
    source = place - prompt_length + first
    return _Columns(
        in_prompt=(place >= 0) & (place < prompt_length),
        in_text=(place >= prompt_length) & (source < length),
        prompt_row=bounds[task][:, None] + torch.arange(max_prompt_length, device=device),
        place=place,
        source=source.clamp(0, max(length - 1, 0)),
        # The first token of a row without a prompt is predicted by nothing, even where a pad stands before it.
        is_predicted=(source > first) | (prompt_length > 0),
    )


def _embeddings(text: Tensor, prompts: Tensor, columns: _Columns) -> Tensor:
    batch, width = columns.place.shape
    if not batch or not width:
        return text.new_zeros(batch, width, text.shape[2])
    # Gathered in the prompts' own dtype and cast afterwards, so that their gradient is summed in it.
    padded = prompts if prompts.shape[0] else prompts.new_zeros(1, prompts.shape[1])
    rows = padded[columns.prompt_row.clamp(max=padded.shape[0] - 1)].to(text.dtype)
    pool = torch.cat([rows, text], dim=1).flatten(0, 1)
    column = torch.where(columns.in_prompt, columns.place, columns.source + rows.shape[1])
    index = torch.arange(batch, device=text.device)[:, None] * width + column
    is_pad = ~(columns.in_prompt | columns.in_text)
    return pool[index.masked_fill(is_pad, 0)].masked_fill_(is_pad[:, :, None], 0)


def _gather_text(values: Tensor, columns: _Columns) -> Tensor:
    if not values.shape[1]:
        return values.new_zeros(columns.source.shape)
    return values.gather(1, columns.source)

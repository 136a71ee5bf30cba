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

    `text` is `[batch, length, hidden]`, ready embeddings; arguments are not checked here. The rows of a prompt
    are gathered in the prompts' own dtype and cast afterwards, so that their gradient is summed in it.
    """
    batch, length, hidden = text.shape
    width = max_prompt_length + length
    has_prompt = task_ids >= 0
    task = task_ids.clamp(min=0)
    # A last empty task lets rows without a prompt read a length even where there is no task at all.
    bounds = torch.cat([offsets, offsets[-1:]])
    first_row = bounds[task]
    prompt_length = torch.where(has_prompt, bounds[task + 1] - first_row, 0)

    is_real = attention_mask != 0
    # Leading pads: the columns before which nothing was real yet. All of them in a row without text.
    first = (is_real.cumsum(1) == 0).sum(1)
    start = max_prompt_length + first - prompt_length if padding_side == "left" else torch.zeros_like(first)

    relative = torch.arange(width, device=text.device) - start[:, None]
    source = relative - prompt_length[:, None] + first[:, None]
    in_prompt = (relative >= 0) & (relative < prompt_length[:, None])
    in_text = (relative >= prompt_length[:, None]) & (source < length)
    source = source.clamp(0, max(length - 1, 0))

    row = torch.arange(batch, device=text.device)[:, None]
    prompt_columns = torch.arange(max_prompt_length, device=text.device)
    if prompts.shape[0] == 0:
        prompts = prompts.new_zeros(1, hidden)
    rows = (first_row[:, None] + prompt_columns).clamp(max=prompts.shape[0] - 1)
    pool = torch.cat([prompts[rows].to(text.dtype), text], dim=1).flatten(0, 1)
    column = torch.where(in_prompt, relative, source + max_prompt_length)
    index = torch.where(in_prompt | in_text, row * width + column, 0)
    if width:
        inputs_embeds = pool[index].masked_fill_(~(in_prompt | in_text)[:, :, None], 0)
    else:
        inputs_embeds = text.new_zeros(batch, 0, hidden)

    if length:
        mask = torch.where(in_text, attention_mask.gather(1, source), 0).to(attention_mask.dtype)
    else:
        mask = attention_mask.new_zeros(batch, width)
    mask = mask.masked_fill(in_prompt, 1)
    position_ids = ((mask != 0).cumsum(1) - 1).clamp(min=0)
    if labels is None:
        return PromptConcat(inputs_embeds, mask, position_ids, None)

    is_scored = in_text & (mask != 0)
    # The first token of a row without a prompt is predicted by nothing, even where a pad stands before it.
    is_scored &= (source > first[:, None]) | (prompt_length > 0)[:, None]
    out = labels.gather(1, source) if length else labels.new_zeros(batch, width)
    return PromptConcat(inputs_embeds, mask, position_ids, out.masked_fill(~is_scored, IGNORED_LABEL))

"""The prompt concatenation in plain torch: used on the CPU, to test the Triton kernels, and to compare their speed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100
_SMALL = 2**19  # elements of text below which the time depends on the number of operations, not on memory traffic


class PromptConcat(NamedTuple):
    """The inputs of a model after its rows were laid out.

    Attributes:
        inputs_embeds: `[batch, width, hidden]`, in the embeddings' dtype; pads are zeros.
        attention_mask: `[batch, width]`, in the given mask's dtype, or int64 if no mask was given. With
            `mask_form="boolean"`: bool `[batch, 1, width, width]`, True where a query (axis 2) sees a key (axis 3).
            With `mask_form="additive"`: the same shape in the embeddings' dtype, 0 where a query sees a key and the
            lowest finite number where it does not.
        position_ids: int64 `[batch, width]`: the number of unmasked columns up to each column, minus 1, at least 0.
        labels: int64 `[batch, width]`, -100 on prompts and pads; None if no labels were given.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


def prompt_concat_reference(
    embeddings: Tensor,
    input_ids: Tensor | None,
    prompts: Tensor,
    offsets: Tensor,
    task_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    *,
    padding_side: str,
    max_prompt_length: int,
    mask_form: str = "padding",
) -> PromptConcat:
    """Lay out rows as `pads | prompt | text` or `prompt | text | pads`; see `softprompt_kernels.prompt_concat`.

    Arguments are not checked here. Every operation is differentiable. On the CPU the layout depends on values, so that
    each embedding is written once. On other devices and under `torch.compile` it does not read values, so that it
    neither waits for the device nor breaks the graph.
    """
    length = embeddings.shape[1] if input_ids is None else input_ids.shape[1]
    if prompts.requires_grad:
        # Prompts are gathered in float32 or wider and cast afterwards, so that their gradients are summed in float32.
        prompts = prompts.to(torch.promote_types(prompts.dtype, torch.float32))
    sees_values = embeddings.device.type == "cpu" and not torch.compiler.is_compiling()
    if sees_values and max_prompt_length:
        begin = _common_layout(offsets, task_ids, attention_mask, max_prompt_length)
        if begin is not None:
            inputs_embeds = _embed_alike(embeddings, input_ids, prompts, begin, max_prompt_length)
            return _concatenate(inputs_embeds, attention_mask, labels, max_prompt_length, mask_form)
    content, prompt_row = _columns(
        length, prompts.shape[0], offsets, task_ids, attention_mask, padding_side, max_prompt_length
    )
    mask, labels = _gather(content, length, attention_mask, labels)
    embed = _embed_in_place if sees_values else _embed_by_selection
    inputs_embeds = embed(embeddings, input_ids, prompts, content, prompt_row, length)
    is_real = mask != 0
    count = is_real.cumsum(1)
    if labels is not None:
        # No token predicts the first unmasked column of a row.
        labels = torch.where(is_real & (count > 1), labels, IGNORED_LABEL)
    if mask_form != "padding":
        mask = _causal(is_real, mask_form, embeddings.dtype)
    return PromptConcat(inputs_embeds, mask, (count - 1).clamp_(min=0), labels)


def _common_layout(
    offsets: Tensor, task_ids: Tensor, attention_mask: Tensor | None, max_prompt_length: int
) -> list[int] | None:
    """Where each row's prompt begins in the packed prompts, if all prompts have full length and no row a leading pad.

    The layout is then a plain concatenation, which takes half as many operations. In any other case the result is None.
    """
    bounds, tasks = offsets.tolist(), task_ids.tolist()
    for task in set(tasks):
        if task < 0 or bounds[task + 1] - bounds[task] != max_prompt_length:
            return None
    if attention_mask is not None and not (attention_mask.shape[1] and attention_mask[:, 0].all()):
        return None
    return [bounds[task] for task in tasks]


def _embed_alike(
    embeddings: Tensor, input_ids: Tensor | None, prompts: Tensor, begin: list[int], max_prompt_length: int
) -> Tensor:
    if len(set(begin)) == 1:
        rows = prompts[begin[0] : begin[0] + max_prompt_length].expand(len(begin), -1, -1)
    else:
        rows = prompts[torch.tensor(begin, dtype=torch.int64)[:, None] + torch.arange(max_prompt_length)]
    rows = rows.to(embeddings.dtype)
    if input_ids is None:
        return torch.cat([rows, embeddings], 1)
    if input_ids.numel() * embeddings.shape[1] < _SMALL:
        return torch.cat([rows, functional.embedding(input_ids, embeddings)], 1)
    # Each embedding is written once, to its final place. The look-up of id 0 reserves the columns of the prompts.
    inputs_embeds = functional.embedding(functional.pad(input_ids, (max_prompt_length, 0)), embeddings)
    return inputs_embeds.index_copy_(1, torch.arange(max_prompt_length), rows)


def _concatenate(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    max_prompt_length: int,
    mask_form: str,
) -> PromptConcat:
    """Add mask, positions and labels for rows that all begin with a prompt.

    As no row begins with text or a pad, every label of unmasked text is kept.
    """
    batch, width = inputs_embeds.shape[:2]
    if attention_mask is None:
        mask = torch.ones(batch, width, dtype=torch.int64)
    else:
        mask = functional.pad(attention_mask, (max_prompt_length, 0), value=1)
        if labels is not None:
            labels = labels.masked_fill(attention_mask == 0, IGNORED_LABEL)
    if labels is not None:
        labels = functional.pad(labels, (max_prompt_length, 0), value=IGNORED_LABEL)
    is_real = mask != 0
    positions = is_real.cumsum(1).sub_(1)
    if mask_form != "padding":
        mask = _causal(is_real, mask_form, inputs_embeds.dtype)
    return PromptConcat(inputs_embeds, mask, positions, labels)


def _columns(
    length: int,
    prompt_rows: int,
    offsets: Tensor,
    task_ids: Tensor,
    attention_mask: Tensor | None,
    padding_side: str,
    max_prompt_length: int,
) -> tuple[Tensor, Tensor]:
    """What each column holds, and its row of the packed prompts if it holds a prompt: both int64 `[batch, width]`.

    What a column holds is written as a text column in `[0, length)`, as `length` for a pad, or as `length + 1` for a
    prompt. Values that were not checked are treated as in the Triton kernel: an unknown task means no prompt, and a
    prompt is cut to `max_prompt_length`.
    """
    tasks = offsets.shape[0] - 1
    has_prompt = (task_ids >= 0) & (task_ids < tasks)
    task = torch.where(has_prompt, task_ids, 0)
    begin = offsets[task].clamp(min=0)
    prompt_length = (offsets[(task + 1).clamp(max=tasks)].clamp(max=prompt_rows) - begin).clamp(0, max_prompt_length)
    prompt_length = torch.where(has_prompt, prompt_length, 0)[:, None]
    begin = begin[:, None]
    if attention_mask is None:
        first = torch.zeros_like(begin)
    else:
        # The number of leading pads: of the columns up to which no mask is set. In a row without text these are all.
        first = ((attention_mask != 0).cumsum(1) == 0).sum(1, keepdim=True)
    # `source` numbers the columns of each row so that its text keeps its own column numbers. The prompt then has the
    # numbers in [first - prompt_length, first).
    prompt_start = first - prompt_length
    column = torch.arange(max_prompt_length + length, device=task_ids.device)
    source = (column - max_prompt_length).expand(len(task_ids), -1) if padding_side == "left" else column + prompt_start
    before_text = torch.where(source >= prompt_start, length + 1, length)
    content = torch.where(source >= first, source.clamp(max=length), before_text)
    return content, source + (begin - prompt_start)


def _gather(
    content: Tensor, length: int, attention_mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The laid-out mask and labels, both `[batch, width]`; labels that no token predicts are not removed yet."""
    pad_and_prompt = torch.arange(2, device=content.device).expand(content.shape[0], -1)
    if attention_mask is None:
        mask = (content != length).long()
    else:
        mask = torch.cat([attention_mask, pad_and_prompt.to(attention_mask.dtype)], 1).gather(1, content)
    if labels is not None:
        labels = functional.pad(labels, (0, 2), value=IGNORED_LABEL).gather(1, content)
    return mask, labels


def _embed_in_place(
    embeddings: Tensor, input_ids: Tensor | None, prompts: Tensor, content: Tensor, prompt_row: Tensor, length: int
) -> Tensor:
    """`inputs_embeds`, made by writing the text for all columns, then pads and prompts over the columns they take."""
    # The tensor is flat from the start, and pads are written before prompts, because autograd would copy a view, or a
    # tensor that already requires a gradient, before writing to it.
    flat = _embed_text(embeddings, input_ids, content, length)
    flat.index_fill_(0, (content == length).flatten().nonzero()[:, 0], 0)
    cells = (content > length).flatten().nonzero()[:, 0]
    rows = prompts.index_select(0, prompt_row.flatten().index_select(0, cells)).to(flat.dtype)
    return flat.index_copy_(0, cells, rows).unflatten(0, content.shape)


def _embed_by_selection(
    embeddings: Tensor, input_ids: Tensor | None, prompts: Tensor, content: Tensor, prompt_row: Tensor, length: int
) -> Tensor:
    """`inputs_embeds`, made without reading values: text and prompts are gathered for all columns, then selected."""
    if input_ids is not None:
        input_ids = input_ids.clamp(0, embeddings.shape[0] - 1)
    text = _embed_text(embeddings, input_ids, content, length).unflatten(0, content.shape)
    if not prompts.shape[0]:
        return torch.where((content < length)[:, :, None], text, 0)
    rows = prompts[prompt_row.clamp(0, prompts.shape[0] - 1)].to(text.dtype)
    return torch.where((content < length)[:, :, None], text, torch.where((content > length)[:, :, None], rows, 0))


def _embed_text(embeddings: Tensor, input_ids: Tensor | None, content: Tensor, length: int) -> Tensor:
    """Text embeddings `[batch * width, hidden]`, with arbitrary values where `content` is not a text column."""
    if input_ids is not None:
        return embeddings.index_select(0, functional.pad(input_ids, (0, 2)).gather(1, content).flatten())
    if not length:
        return embeddings.new_zeros(content.numel(), embeddings.shape[2])
    row = torch.arange(content.shape[0], device=content.device)[:, None]
    return embeddings.flatten(0, 1).index_select(0, (content.clamp(max=length - 1) + row * length).flatten())


def _causal(is_real: Tensor, mask_form: str, dtype: torch.dtype) -> Tensor:
    """The causal mask `[batch, 1, width, width]`: a query sees the unmasked keys up to its own column."""
    width = is_real.shape[1]
    column = torch.arange(width, device=is_real.device)
    sees = (column[:, None] >= column) & is_real[:, None, None, :]
    if mask_form == "boolean":
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)

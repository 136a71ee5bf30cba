"""`prompt_concat`: soft prompts of different tasks and lengths in front of the rows of one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from softprompt_kernels.reference import PromptConcat, prompt_concat_reference


def prompt_concat(
    embeddings: Tensor,
    input_ids: Tensor | None,
    prompts: Tensor,
    offsets: Tensor,
    task_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    padding_side: str,
    max_prompt_length: int,
) -> PromptConcat:
    """Lay out every row of a batch as `pads | prompt | text` ("left") or `prompt | text | pads` ("right").

    Pads are outermost on both sides: leading pads of the text move in front of the prompt, so that nothing stands
    between a prompt and its text. With `first` the first column of a row whose mask is set, `P` the length of its
    prompt and `start` the column where that begins (`max_prompt_length + first - P` on the left, 0 on the right),
    column `c` holds prompt row `c - start` below `P`, else text column `first + c - start - P`. The width
    `max_prompt_length + length` is known without asking the device.

    Args:
        embeddings: `[vocab, hidden]`, a table read at `input_ids`; or `[batch, length, hidden]`, with `input_ids=None`.
        input_ids: int64 `[batch, length]`, or None.
        prompts: `[sum of lengths, hidden]`, the prompts of all tasks one after another; any floating dtype, cast to
            that of `embeddings` (round to nearest even).
        offsets: int64 `[tasks + 1]`: the prompt of task `t` is `prompts[offsets[t]:offsets[t + 1]]`.
        task_ids: int64 `[batch]`; -1 is a row without a prompt.
        attention_mask: `[batch, length]`, integer or bool; None is all ones. Holes are kept.
        labels: int64 `[batch, length]`.
        padding_side: "left" or "right".
        max_prompt_length: at least the longest prompt of a task of the batch.

    Returns:
        A `PromptConcat`. A label is kept where its column is unmasked text and something predicts it: the last
        row of a prompt predicts the first token; the first token of a row without a prompt gets -100.

    Raises:
        TypeError: an argument of a wrong type or dtype, by name.
        ValueError: any other wrong argument, by name. Values (an id out of range) are checked on the CPU alone,
            where that costs no synchronisation.

    Example:
        >>> import torch
        >>> out = prompt_concat(
        ...     torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0, 1], [2, 2]]),
        ...     torch.tensor([[7.0], [8.0]]), torch.tensor([0, 2]), torch.tensor([0, -1]),
        ...     padding_side="left", max_prompt_length=2)
        >>> out.inputs_embeds[:, :, 0].tolist()
        [[7.0, 8.0, 1.0, 2.0], [0.0, 0.0, 3.0, 3.0]]
        >>> out.attention_mask.tolist()
        [[1, 1, 1, 1], [0, 0, 1, 1]]
    """
    batch, length = _check_text(embeddings, input_ids)
    _check_prompts(embeddings, prompts, offsets)
    _check_integers("task_ids", task_ids, (batch,))
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    if not isinstance(max_prompt_length, int):
        raise TypeError(f"max_prompt_length must be an int, got {type(max_prompt_length).__name__}")
    if max_prompt_length < 0:
        raise ValueError(f"max_prompt_length must not be negative, got {max_prompt_length}")
    if labels is not None:
        _check_integers("labels", labels, (batch, length))
    if attention_mask is None:
        attention_mask = torch.ones(batch, length, dtype=torch.int64, device=embeddings.device)
    _check_mask(attention_mask, (batch, length))
    named = dict(input_ids=input_ids, prompts=prompts, offsets=offsets, task_ids=task_ids, labels=labels)
    for name, tensor in {**named, "attention_mask": attention_mask}.items():
        if tensor is not None and tensor.device != embeddings.device:
            raise ValueError(f"{name} is on {tensor.device}, embeddings on {embeddings.device}; move one of them")
    if embeddings.device.type == "cpu":
        _check_values(embeddings, input_ids, prompts, offsets, task_ids, max_prompt_length)
    text = embeddings if input_ids is None else functional.embedding(input_ids, embeddings)
    return prompt_concat_reference(
        text,
        prompts,
        offsets,
        task_ids,
        attention_mask,
        labels,
        padding_side=padding_side,
        max_prompt_length=max_prompt_length,
    )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_integers(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")


def _check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    _check_tensor("attention_mask", mask)
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"attention_mask must be integer or bool, got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must have shape {list(shape)}, got {list(mask.shape)}")


def _check_text(embeddings: Tensor, input_ids: Tensor | None) -> tuple[int, int]:
    _check_tensor("embeddings", embeddings)
    if not embeddings.dtype.is_floating_point:
        raise TypeError(f"embeddings must be floating point, got {embeddings.dtype}")
    expected = 3 if input_ids is None else 2
    if embeddings.ndim != expected:
        form = "[batch, length, hidden] without input_ids" if input_ids is None else "[vocab, hidden] with input_ids"
        raise ValueError(f"embeddings must be {form}, got shape {list(embeddings.shape)}")
    if input_ids is None:
        return embeddings.shape[0], embeddings.shape[1]
    _check_tensor("input_ids", input_ids)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [batch, length], got shape {list(input_ids.shape)}")
    _check_integers("input_ids", input_ids, tuple(input_ids.shape))
    return input_ids.shape[0], input_ids.shape[1]


def _check_prompts(embeddings: Tensor, prompts: Tensor, offsets: Tensor) -> None:
    _check_tensor("prompts", prompts)
    if not prompts.dtype.is_floating_point:
        raise TypeError(f"prompts must be floating point, got {prompts.dtype}")
    if prompts.ndim != 2 or prompts.shape[1] != embeddings.shape[-1]:
        raise ValueError(f"prompts must be [rows, {embeddings.shape[-1]}] as embeddings, got {list(prompts.shape)}")
    _check_tensor("offsets", offsets)
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [tasks + 1], got shape {list(offsets.shape)}")
    _check_integers("offsets", offsets, tuple(offsets.shape))


def _check_values(
    embeddings: Tensor,
    input_ids: Tensor | None,
    prompts: Tensor,
    offsets: Tensor,
    task_ids: Tensor,
    max_prompt_length: int,
) -> None:
    if input_ids is not None and input_ids.numel():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= embeddings.shape[0]:
            raise ValueError(f"input_ids must lie in [0, {embeddings.shape[0]}), found {low} to {high}")
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != prompts.shape[0] or bool((lengths < 0).any()):
        raise ValueError(f"offsets must rise from 0 to the {prompts.shape[0]} rows of prompts, got {offsets.tolist()}")
    if not task_ids.numel():
        return
    low, high = int(task_ids.min()), int(task_ids.max())
    if low < -1 or high >= lengths.shape[0]:
        raise ValueError(f"task_ids must lie in [-1, {lengths.shape[0]}), found {low} to {high}")
    present = task_ids[task_ids >= 0]
    longest = int(lengths[present].max()) if present.numel() else 0
    if longest > max_prompt_length:
        raise ValueError(f"max_prompt_length is {max_prompt_length}, but a prompt of the batch has {longest} rows")

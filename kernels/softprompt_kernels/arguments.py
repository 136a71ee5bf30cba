"""The checks of the arguments of `prompt_concat`, which run on the host before a kernel is launched."""

from __future__ import annotations

import torch
from torch import Tensor

PADDING_SIDES = ("left", "right")
MASK_FORMS = ("padding", "boolean", "additive")
BACKENDS = ("auto", "triton", "reference")
_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_arguments(
    embeddings: Tensor,
    input_ids: Tensor | None,
    prompts: Tensor,
    offsets: Tensor,
    task_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    padding_side: str,
    max_prompt_length: int,
    mask_form: str,
    backend: str,
) -> None:
    """Check types, dtypes, shapes and devices: everything that is known without reading values from the device.

    Raises:
        TypeError: an argument of a wrong type or dtype. The message begins with the argument's name.
        ValueError: any other wrong argument. The message begins with the argument's name.
    """
    batch, length = _check_text(embeddings, input_ids)
    _check_prompts(embeddings, prompts, offsets)
    _check_integers("task_ids", task_ids, (batch,))
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask)
        if attention_mask.dtype not in _MASK_DTYPES:
            raise TypeError(f"attention_mask must be bool, uint8 or a signed integer, got {attention_mask.dtype}")
        _check_shape("attention_mask", attention_mask, (batch, length))
    if labels is not None:
        _check_integers("labels", labels, (batch, length))
    if not isinstance(max_prompt_length, (int, torch.SymInt)):
        raise TypeError(f"max_prompt_length must be an int, got {type(max_prompt_length).__name__}")
    if max_prompt_length < 0:
        raise ValueError(f"max_prompt_length must not be negative, got {max_prompt_length}")
    _check_choice("padding_side", padding_side, PADDING_SIDES)
    _check_choice("mask_form", mask_form, MASK_FORMS)
    _check_choice("backend", backend, BACKENDS)
    device = embeddings.device
    _check_device("input_ids", input_ids, device)
    _check_device("prompts", prompts, device)
    _check_device("offsets", offsets, device)
    _check_device("task_ids", task_ids, device)
    _check_device("attention_mask", attention_mask, device)
    _check_device("labels", labels, device)


def check_ids(embeddings: Tensor, input_ids: Tensor | None) -> None:
    """Check that all ids are rows of the embedding table. On a GPU this waits for the device.

    Raises:
        ValueError: an id is not.
    """
    if input_ids is not None and input_ids.numel():
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= embeddings.shape[0]:
            raise ValueError(f"input_ids must lie in [0, {embeddings.shape[0]}), found {low} to {high}")


def check_tasks(prompts: Tensor, offsets: Tensor, task_ids: Tensor, max_prompt_length: int) -> None:
    """Check that the offsets divide the packed prompts and that each row's task is one of them or -1.

    On a GPU this waits for the device.

    Raises:
        ValueError: an offset, a task or the length of a prompt is out of range. The message begins with the argument's
            name.
    """
    bounds, tasks = offsets.tolist(), task_ids.tolist()
    if bounds[0] != 0 or bounds[-1] != prompts.shape[0] or bounds != sorted(bounds):
        raise ValueError(f"offsets must rise from 0 to the {prompts.shape[0]} rows of prompts, got {bounds}")
    known = range(-1, len(bounds) - 1)
    longest = 0
    for task in set(tasks):
        if task not in known:
            raise ValueError(f"task_ids must lie in [-1, {len(bounds) - 1}), found {task}")
        if task >= 0:
            longest = max(longest, bounds[task + 1] - bounds[task])
    if longest > max_prompt_length:
        raise ValueError(f"max_prompt_length is {max_prompt_length}, but a prompt of the batch has {longest} rows")


def _check_text(embeddings: Tensor, input_ids: Tensor | None) -> tuple[int, int]:
    _check_floating("embeddings", embeddings)
    expected = 3 if input_ids is None else 2
    if embeddings.ndim != expected:
        form = "[batch, length, hidden] without input_ids" if input_ids is None else "[vocab, hidden] with input_ids"
        raise ValueError(f"embeddings must be {form}, got shape {list(embeddings.shape)}")
    if not embeddings.shape[-1]:
        raise ValueError(f"embeddings must have a hidden size above 0, got shape {list(embeddings.shape)}")
    if input_ids is None:
        return embeddings.shape[0], embeddings.shape[1]
    if not embeddings.shape[0]:
        raise ValueError("embeddings must have at least one row to read at input_ids, got none")
    if not embeddings.is_contiguous():
        raise ValueError("embeddings must be contiguous as a table; call .contiguous() on it once, not at each step")
    _check_tensor("input_ids", input_ids)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [batch, length], got shape {list(input_ids.shape)}")
    _check_integers("input_ids", input_ids, (input_ids.shape[0], input_ids.shape[1]))
    return input_ids.shape[0], input_ids.shape[1]


def _check_prompts(embeddings: Tensor, prompts: Tensor, offsets: Tensor) -> None:
    _check_floating("prompts", prompts)
    if prompts.ndim != 2 or prompts.shape[1] != embeddings.shape[-1]:
        raise ValueError(f"prompts must be [rows, {embeddings.shape[-1]}] as embeddings, got {list(prompts.shape)}")
    if not prompts.is_contiguous():
        raise ValueError("prompts must be contiguous; call .contiguous() on the packed prompts")
    _check_tensor("offsets", offsets)
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [tasks + 1], got shape {list(offsets.shape)}")
    _check_integers("offsets", offsets, (offsets.shape[0],))


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    layer = value
    # torch.compile cannot trace these calls, and there are no functorch wrappers while it compiles.
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(layer):
        if torch._C._functorch.is_batchedtensor(layer):
            raise ValueError(f"{name} is batched by torch.vmap; prompt_concat lays out whole batches: call it without")
        layer = torch._C._functorch.get_unwrapped(layer)


def _check_floating(name: str, value: Tensor) -> None:
    _check_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def _check_integers(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    _check_shape(name, value, shape)


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_device(name: str, value: Tensor | None, device: torch.device) -> None:
    if value is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, embeddings on {device}; move one of them")

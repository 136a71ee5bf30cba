"""Generation row by row, for models whose rows of different lengths cannot be continued in one batch.

Without positions a model counts columns, and a recurrent one reads pads: a padded row that is continued is not what it
is alone. So each row is generated alone, without its pads, and the results are put together as `generate` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_softprompt.attachment.routing import Tasks

_PUTS_OUT_MORE = ("return_dict_in_generate", "streamer", "cache", "past_key_values", "assistant_model")


def is_needed(text: Tensor, mask: Tensor, prompt_lengths: Sequence[int], options: Mapping[str, Any]) -> bool:
    """Whether rows differ in length with their prompts, or hold pads, and what each puts out can be put together.

    That can be where the rows are ids, `[batch, length]`, and `generate` with these options returns ids alone.
    """
    if len(mask) < 2 or text.is_floating_point() or any(options.get(name) for name in _PUTS_OUT_MORE):
        return False
    lengths = (mask != 0).sum(1) + torch.tensor(prompt_lengths, device=mask.device)
    return bool((lengths != lengths[0]).any() | (mask == 0).any())


def generate(
    run: Callable[..., Tensor], ids: Tensor, tasks: Tasks, given: dict[str, Any], options: Mapping[str, Any]
) -> Tensor:
    """Generate for each row of `ids` alone, without its outer pads.

    Tensors with a row for each row of `ids`, and columns for its columns, are cut alike. Processors and criteria of the
    caller's see one row at a time; `prefix_allowed_tokens_fn` is told which.

    Args:
        run: called as `run(task, input_ids=…, attention_mask=…, **arguments)` for one row.
        ids: int64 `[batch, length]`.
        tasks: of the rows.
        given: the arguments of `generate`.
        options: the options that hold, those of configurations included.

    Returns:
        int64 `[batch * sequences, length + longest]`: the rows as given, then what is new, padded on the right.
    """
    batch, length = ids.shape
    given = {name: value for name, value in given.items() if name not in ("input_ids", "inputs")}
    mask = given.pop("attention_mask")
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        # These limits count the text as it was given, with its pads.
        given.pop(name, None)
        if options.get(name) and new not in options:
            given[new] = max(options[name] - length, 0)
    rows = []
    for row in range(batch):
        real = (mask[row] != 0).nonzero()[:, 0]
        kept = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(length - 1, length)
        own = {name: _cut(value, row, kept, batch, length) for name, value in given.items()}
        if own.get("prefix_allowed_tokens_fn") is not None:
            own["prefix_allowed_tokens_fn"] = partial(_of_row, own["prefix_allowed_tokens_fn"], row)
        text = {"input_ids": ids[row : row + 1, kept], "attention_mask": mask[row : row + 1, kept]}
        out = run(tasks[row], **text, **own)
        rows.append((ids[row].expand(len(out), -1), out[:, kept.stop - kept.start :]))
    longest, pad = max(new.shape[1] for _, new in rows), _pad_token_id(options)
    padded = (torch.cat([text, functional.pad(new, (0, longest - new.shape[1]), value=pad)], 1) for text, new in rows)
    return torch.cat(list(padded))


def _of_row(allowed: Callable[[int, Tensor], list[int]], row: int, batch_id: int, ids: Tensor) -> list[int]:
    return allowed(row, ids)


def _pad_token_id(options: Mapping[str, Any]) -> int:
    """The pad token, or the end-of-text token where there is none, as in `generate`."""
    for name in ("pad_token_id", "eos_token_id"):
        value = options.get(name)
        if value is not None:
            return int(torch.as_tensor(value, device="cpu").flatten()[0])
    return 0


def _cut(value: Any, row: int, kept: slice, batch: int, length: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] != batch:
        return value
    value = value[row : row + 1]
    return value[:, kept] if value.shape[1] == length else value

"""`generate` of an attached model: each row that is given has a task, also where it is repeated inside."""

from __future__ import annotations

import inspect
from collections import ChainMap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_softprompt.attachment import caches, routing, row_by_row
from lightning_softprompt.attachment.routing import Route
from lightning_softprompt.attachment.running import route_of
from lightning_softprompt.base.model_types import NO_CONTINUATION, reason
from lightning_softprompt.errors import SoftPromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_softprompt.attachment.attachment import Attachment


def generate(attachment: Attachment, *args: Any, task_ids: Any = None, tasks: Any = None, **kwargs: Any) -> Any:
    """Stands in for the model's `generate`, and takes the tasks of the rows, too."""
    model, own = attachment.model, cast(Any, type(attachment.model)).generate
    kwargs = {**dict(zip([*inspect.signature(own).parameters][1:], args, strict=False)), **kwargs}
    text = input_tensor(kwargs)
    if text is not None and kwargs.get("attention_mask") is None:
        # Without a mask, `generate` guesses one from the pad token, which is often the end-of-text token.
        kwargs["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
    options = options_of(model, kwargs)
    check_token_healing(options, text)
    given, around = routing.from_batch({"task_ids": task_ids, "tasks": tasks}), route_of(attachment)
    cache = caches.find(kwargs)
    times = max(int(options.get(name, 1)) for name in ("num_beams", "num_return_sequences"))
    if given is None and text is not None and (around is None or around.tasks is None):
        given = tasks_of(attachment, cache, len(text), times)
    to_come = 0 if text is None else new_columns(options, text.shape[1])
    with attachment.routed(given, repeats=True, columns_to_come=to_come) as route:
        # A cache that is given for beams, or for several sequences, has as many rows as these.
        caches.check_tasks(cache, route.tasks and tuple(task for task in route.tasks for _ in range(times)))
        is_right = attachment.traits.padding_side == "right"
        if text is not None:
            # `generate` may repeat rows, as beams, but each row that it is given has a task of its own.
            rows = routing.rows_of(attachment.prompts, Route(route.tasks), len(text))
            kwargs = kwargs if is_right else padded_on_the_left(kwargs)
        mask: Any = kwargs.get("attention_mask")
        if route.has_prompts:
            check_generation(model, options, is_right)
            if is_right:
                kwargs["disable_compile"] = True  # each token would be compiled anew
            check_texts(mask)
            # Logits show that a prompt is not finite. Tokens do not.
            attachment.prompts.check_finite(route.tasks or attachment.prompts.tasks[:1], model.dtype)
            if reason(NO_CONTINUATION, model.config):
                kwargs.setdefault("use_cache", False)
        if text is not None and is_right and row_by_row.is_needed(text, mask, rows.lengths, options):

            def generate_row(task: str | None, **of_row: Any) -> Any:
                with attachment.routed([task], repeats=True):
                    return own(model, **of_row)

            return row_by_row.generate(generate_row, text, rows.tasks, kwargs, options)
        return own(model, **kwargs)


def tasks_of(attachment: Attachment, cache: Any, rows: int, times: int) -> routing.Tasks:
    """The tasks of a call that names none: those of the rows that filled its cache, or the only one there is.

    Args:
        attachment: whose prompts these are.
        cache: of the call, or None.
        rows: how many the call has.
        times: how often each of them stands in the cache.
    """
    held = caches.tasks_of(cache, rows * times)
    return held[::times] if held else routing.rows_of(attachment.prompts, Route(), rows).tasks


def options_of(model: PreTrainedModel, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options that hold: those of a call, then of the configuration that it gives, then of the model's own."""
    configs = given.get("generation_config"), model.generation_config
    layers = [given, *(vars(config) for config in configs if config is not None)]
    return ChainMap(*({name: value for name, value in layer.items() if value is not None} for layer in layers))


def padded_on_the_left(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate`, with pads moved from behind the texts to the front.

    `generate` puts new tokens behind the last column, and so pads behind a text would come to stand inside of it.
    """
    mask = given["attention_mask"]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask[:, -1] != 0).all()):
        return given
    if caches.length(caches.find(given)):
        raise SoftPromptError(
            "pads stand behind the text that goes on from a cache, and new tokens would come behind them; pad the rows "
            "on the left (tokenizer.padding_side = 'left') and fill the cache with them"
        )
    behind = ((mask != 0).flip(1).cumsum(1) == 0).sum(1, keepdim=True)
    columns = (torch.arange(mask.shape[1], device=mask.device) - behind) % mask.shape[1]

    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and len(positions) == 1:
        given = {**given, "position_ids": positions.expand(len(mask), -1)}

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        return value[torch.arange(len(mask), device=value.device)[:, None], columns.to(value.device)]

    return {name: moved(value) for name, value in given.items()}


def input_tensor(given: Mapping[str, Any]) -> Tensor | None:
    """The ids or embeddings that a call of `generate` is given."""
    found = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    return next((each for each in found if each is not None), None)


def check_texts(mask: Any) -> None:
    """Raise a `SoftPromptError` for a row without a token, behind whose prompt `generate` would go on from a pad."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool((mask != 0).any(1).all()):
        empty = (mask != 0).any(1).tolist().index(False)
        raise SoftPromptError(
            f"row {empty} has no token of text, as its attention_mask holds zeros alone; every row needs at least one"
        )


def check_generation(model: PreTrainedModel, options: Mapping[str, Any], is_right: bool) -> None:
    """Raise a `SoftPromptError` for a way of generating in which prompts have no place."""
    scale = options.get("guidance_scale")
    if scale is not None and scale != 1:
        raise SoftPromptError(
            f"guidance_scale={scale} compares the text with a shorter one, which would get the prompt too; leave it out"
        )
    if options.get("assistant_early_exit") is not None:
        raise SoftPromptError(
            "assistant_early_exit drafts with the first layers of the model, for which no prompt was trained; leave it "
            "out, or draft with prompt_lookup_num_tokens or an assistant_model"
        )
    if options.get("prefill_chunk_size") is not None and "static" in str(options.get("cache_implementation")):
        raise SoftPromptError(
            "prefill_chunk_size fills a static cache in chunks whose masks have no room for prompts; leave it out, or "
            "leave cache_implementation out"
        )
    if is_right and options.get("compile_config") is not None and not options.get("disable_compile"):
        raise SoftPromptError(
            f"compile_config asks for compiled passes, and rows of {type(model).__name__} that have prompts begin at "
            "the first column, under masks that grow with every token; leave it out, or give disable_compile=True"
        )


def check_token_healing(options: Mapping[str, Any], text: Tensor | None) -> None:
    """Raise a `SoftPromptError` where tokens of several rows are to be healed."""
    if options.get("token_healing") and text is not None and len(text) > 1:
        raise SoftPromptError(
            "token_healing generates for one row after another inside of the call, and nothing says whose each is; "
            "generate row by row, or leave it out"
        )


def no_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's `init_continuous_batching`, with which `generate_batch` and all of its kind begin.

    Raises:
        SoftPromptError: always.
    """
    raise SoftPromptError(
        "continuous batching packs rows into one, in a thread that knows nothing of their tasks; call generate without "
        "cache_implementation='paged', or serve the model with `lightning-softprompt serve`"
    )


def new_columns(options: Mapping[str, Any], length: int) -> int:
    """The most columns that `generate` adds to a text of `length` columns: by its options, or else by its default."""
    if "max_new_tokens" in options:
        return int(options["max_new_tokens"])
    return max(int(options["max_length"]) - length, 0) if "max_length" in options else 20

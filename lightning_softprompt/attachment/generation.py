"""`generate` of an attached model: each row that is given has a task, also where it is repeated inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_softprompt.attachment import caches, routing, row_by_row
from lightning_softprompt.attachment.routing import Route
from lightning_softprompt.base.model_types import NO_CONTINUATION, reason
from lightning_softprompt.errors import SoftPromptError

if TYPE_CHECKING:
    from lightning_softprompt.attachment.attachment import Attachment


def generate(attachment: Attachment, *args: Any, task_ids: Any = None, tasks: Any = None, **kwargs: Any) -> Any:
    """Stands in for the model's `generate`, and takes the tasks of the rows, too."""
    model = attachment.model
    text = input_tensor(args, kwargs)
    if text is not None and kwargs.get("attention_mask") is None:
        # Without a mask, `generate` guesses one from the pad token, which is often the end-of-text token.
        kwargs["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
    if text is not None and attachment.traits.padding_side == "left":
        args, kwargs = padded_on_the_left(args, kwargs)
    config = kwargs.get("generation_config") or model.generation_config
    given = routing.from_batch({"task_ids": task_ids, "tasks": tasks})
    to_come = 0 if text is None else new_columns(kwargs, config, text.shape[1])
    with attachment.routed(given, repeats=True, columns_to_come=to_come) as route:
        caches.check_tasks(caches.find(kwargs), route.ids)
        if text is not None and route.ids is not None:
            # `generate` may repeat rows, as beams, but each row that it is given has a task of its own.
            routing.rows_of(attachment.prompts, Route(route.ids), text.shape[0])
        if route.has_prompts:
            check_generation(kwargs, config)
            # Logits show that a prompt is not finite. Tokens do not.
            attachment.prompts.check_finite((0,) if route.ids is None else route.ids, model.dtype)
            kwargs["disable_compile"] = True  # a compiled pass would trace through the hooks
            if reason(NO_CONTINUATION, model.config):
                kwargs.setdefault("use_cache", False)
        # A second positional argument may be anything. Rows are run one by one where all arguments are understood.
        is_padded_right = attachment.traits.padding_side == "right"
        if text is not None and len(args) < 2 and is_padded_right and row_by_row.can_run(text, kwargs):
            rows = routing.rows_of(attachment.prompts, Route(route.ids), text.shape[0])
            if row_by_row.is_ragged(kwargs["attention_mask"], torch.tensor(rows.lengths)):

                def generate_row(task: int, **options: Any) -> Any:
                    with attachment.routed(torch.tensor([task]), repeats=True):
                        return cast(Any, type(model)).generate(model, **options)

                return row_by_row.generate(generate_row, text, rows.ids, kwargs, config)
        return cast(Any, type(model)).generate(model, *args, **kwargs)


def padded_on_the_left(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `generate`, with pads moved from behind the texts to the front.

    `generate` puts new tokens behind the last column, and so pads behind a text would come to stand inside of it.
    """
    mask = kwargs["attention_mask"]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask[:, -1] != 0).all()):
        return args, kwargs
    if caches.length(caches.find(kwargs)):
        raise SoftPromptError(
            "pads stand behind the text that goes on from a cache, and new tokens would come behind them; pad the rows "
            "on the left (tokenizer.padding_side = 'left') and fill the cache with them"
        )
    behind = ((mask != 0).flip(1).cumsum(1) == 0).sum(1, keepdim=True)
    columns = (torch.arange(mask.shape[1], device=mask.device) - behind) % mask.shape[1]

    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and len(positions) == 1:
        kwargs = {**kwargs, "position_ids": positions.expand(len(mask), -1)}

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        return value[torch.arange(len(mask), device=value.device)[:, None], columns.to(value.device)]

    return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}


def input_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The ids or embeddings that a call of `generate` is given."""
    given = args[0] if args else None
    for name in ("inputs", "input_ids", "inputs_embeds"):
        given = kwargs.get(name) if given is None else given
    return given


def check_generation(options: dict[str, Any], config: Any) -> None:
    """Raise a `SoftPromptError` for a way of generating in which prompts have no place."""

    def wanted(name: str) -> Any:
        return options.get(name, getattr(config, name, None))

    scale = wanted("guidance_scale")
    if scale is not None and scale != 1:
        raise SoftPromptError(
            f"guidance_scale={scale} compares the text with a shorter one, which would get the prompt too; leave it out"
        )
    if wanted("assistant_early_exit") is not None:
        raise SoftPromptError(
            "assistant_early_exit drafts with the first layers of the model, for which no prompt was trained; leave it "
            "out, or draft with prompt_lookup_num_tokens or an assistant_model"
        )
    if wanted("compile_config") is not None and not wanted("disable_compile"):
        raise SoftPromptError(
            "compile_config asks for compiled passes, and those with prompts are not compiled; leave it out, or give "
            "disable_compile=True"
        )
    if wanted("prefill_chunk_size") is not None and "static" in str(wanted("cache_implementation")):
        raise SoftPromptError(
            "prefill_chunk_size fills a static cache in chunks whose masks have no room for prompts; leave it out, or "
            "leave cache_implementation out"
        )


def new_columns(options: dict[str, Any], config: Any, length: int) -> int:
    """The most columns that `generate` adds to a text of `length` columns: by its options, or else by its default."""
    found = {name: options.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length")}
    if found["max_new_tokens"] is not None:
        return int(found["max_new_tokens"])
    return 20 if found["max_length"] is None else max(int(found["max_length"]) - length, 0)

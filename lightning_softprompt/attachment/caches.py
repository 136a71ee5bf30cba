"""The cache of an attached model: what its columns hold, and a length that counts the text alone.

Outside a forward pass a cache tells the length of its text, so that code which slices ids by it (`generate`, a
user's own loop) is right; inside, the model sees every column.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import StaticCache

from lightning_softprompt.attachment.layout import Layout
from lightning_softprompt.attachment.routing import Tasks
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = {"cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states"}
_LAYOUT = "soft_prompt_layout"
_UNKNOWN = object()
_ROOM = "soft_prompt_room"
_REPEATS = "batch_repeat_interleave"
_ROW_METHODS = ("reorder_cache", "batch_select_indices", _REPEATS)


def find(values: Any) -> Any:
    """The cache among a call's arguments or a model's outputs, by whichever name; None where there is none."""
    return next((value for name, value in values.items() if name in _NAMES and value is not None), None)


def put(arguments: dict[str, Any], traits: ModelTraits, cache: Any) -> None:
    """Give a call this cache, under the name that the model has for it, in place of any other."""
    for name in _NAMES.intersection(arguments):
        del arguments[name]
    arguments[traits.cache_argument] = cache


def length(cache: Any) -> int | None:
    """How many columns the cache holds in all; None where it does not tell."""
    counts = getattr(type(cache), "get_seq_length", None)
    if counts is None:
        return None
    try:
        count = counts(cache)
    except ValueError:  # recurrent layers alone
        return None
    return None if count is None else int(count)  # Reformer's answers None


def remembered(cache: Any) -> Layout | None:
    """The layout the cache was filled with; None for one that is empty, reset or unknown."""
    if cache is None or length(cache) == 0:
        return None
    return getattr(cache, _LAYOUT, None)


def remember(cache: Any, layout: Layout | None) -> None:
    """Keep the layout with the cache, which then tells the text's length; None stands for rows without prompts."""
    if cache is None or not hasattr(cache, "__dict__"):
        return
    setattr(cache, _LAYOUT, layout)
    hide_prompt_columns(cache)


def to_bare(cache: Any, mask: Tensor) -> Tensor:
    """Make a filled cache one of rows without prompts: what stands in front of a text counts as text from now on.

    Where no pads stand inside of a row any more, the model goes on from such a cache with no tasks, as from any of
    rows without prompts. Rows of several caches may be put together, whatever their tasks.

    Args:
        cache: a cache of keys and values that a pass of an attached model filled.
        mask: of the text that the pass was given, `[batch, columns of text]`.

    Returns:
        The mask of all columns that the cache holds, `[batch, columns]`, those of prompts included.
    """
    layout = remembered(cache)
    reveal_prompt_columns(cache)
    for name in _ROW_METHODS:
        cache.__dict__.pop(name, None)
    remember(cache, None)
    return mask if layout is None else layout.attention_mask


def has_no_prompts(cache: Any) -> bool:
    """Whether the cache was filled by rows without prompts, as far as is known."""
    return hasattr(cache, "__dict__") and length(cache) != 0 and getattr(cache, _LAYOUT, _UNKNOWN) is None


def check_tasks(cache: Any, tasks: Tasks | None) -> None:
    """Raise a `SoftPromptError` where a call names other tasks than those of the rows that filled the cache."""
    layout = remembered(cache)
    if tasks is None:
        return
    if layout is not None:
        layout.of_rows(len(tasks), tasks)
    elif has_no_prompts(cache) and any(task is not None for task in tasks):
        raise SoftPromptError(
            f"the cache was filled by rows without a prompt, the call names tasks {list(tasks)}; pass the same tasks "
            "or none, or start with an empty cache"
        )


def tasks_of(cache: Any, rows: int) -> Tasks | None:
    """The tasks of the rows that filled a cache, for `rows` rows that continue it; None where nothing is known."""
    layout = remembered(cache)
    if layout is not None:
        return layout.of_rows(rows, None).tasks
    return (None,) * rows if has_no_prompts(cache) else None


def check_can_continue(cache: Any, model: PreTrainedModel) -> None:
    """Raise a `SoftPromptError` for a cache that is filled, and that no attached model filled."""
    if cache is None or (hasattr(cache, "__dict__") and not length(cache)):
        return
    if not hasattr(cache, "__dict__"):
        raise SoftPromptError(
            f"the cache of {type(model).__name__} is a {type(cache).__name__}, which cannot be continued, as nothing "
            "tells which rows have which prompt; generate with use_cache=False"
        )
    raise SoftPromptError(
        "nothing is known of what the cache holds, as it was not filled through this attachment, or by a pass that "
        "failed; start with an empty one"
    )


def hide_prompt_columns(cache: Any) -> None:
    """Let the cache tell the length of its text, and its layout follow its rows."""
    layout = remembered(cache)
    if layout is None:
        return
    if length(cache) is not None:
        cache.get_seq_length = _Method(cache, _text_length, layout.extra)
    for name in _ROW_METHODS:
        if hasattr(type(cache), name):
            setattr(cache, name, _Method(cache, _change_rows, name))


def reveal_prompt_columns(cache: Any) -> None:
    """Let the cache tell the length of everything it holds."""
    if cache is not None and hasattr(cache, "__dict__"):
        cache.__dict__.pop("get_seq_length", None)


def make_room(cache: StaticCache, model: PreTrainedModel, extra: int, most: int) -> None:
    """Let a cache, sized for the text, hold prompts, too.

    Its size depends on the attached prompts, not on the tasks of a batch: a pass that was compiled for one batch has
    the shapes of the next.

    Args:
        cache: of which others than static ones have no need, as they grow by themselves.
        model: whose cache it is.
        extra: columns that this batch needs beyond its text.
        most: columns that batches to come may need.
    """
    if extra <= (room := getattr(cache, _ROOM, 0)):
        return
    # `get_max_length` will not do: layers that keep a recurrent state beside their keys answer -1 (transformers 5.23).
    layers: list[Any] = [layer for layer in cache.layers if hasattr(layer, "max_cache_len")]
    if not layers:  # recurrent states alone have room for anything
        return
    if any(layer.is_initialized for layer in layers):
        raise SoftPromptError(
            f"the static cache was allocated with room for prompts of {room} tokens, this batch needs {extra}; "
            "pass a fresh StaticCache"
        )
    room_now = max(extra, most)
    size = max(layer.max_cache_len for layer in layers) + room_now - room
    cache.layers = StaticCache(config=model.config, max_cache_len=size).layers
    setattr(cache, _ROOM, room_now)


class _Method:
    """A method of one cache that does not keep the cache alive.

    A cycle of references would hold all keys and values, and in training the graph behind them, until Python collects
    garbage. A deep copy is a method of the copied cache.
    """

    def __init__(self, cache: Any, function: Callable[..., Any], argument: Any) -> None:
        self._cache = weakref.ref(cache)
        self._function = function
        self._argument = argument

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        if cache is None:
            raise SoftPromptError("the cache that this one is a shallow copy of is gone; copy it with copy.deepcopy")
        return self._function(cache, self._argument, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Method, (self._cache(), self._function, self._argument)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Method:
        cache = self._cache()
        return _Method(memo.get(id(cache), cache), self._function, self._argument)


def _text_length(cache: Any, extra: int, layer_idx: int = 0) -> Any:
    return max(type(cache).get_seq_length(cache, layer_idx) - extra, 0)


def _change_rows(cache: Any, method: str, rows_or_times: Any) -> Any:
    result = getattr(type(cache), method)(cache, rows_or_times)
    layout = getattr(cache, _LAYOUT)
    changed = layout.repeated if method == _REPEATS else layout.select
    setattr(cache, _LAYOUT, changed(rows_or_times))
    return result

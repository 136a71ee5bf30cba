"""The rows under way in one batch: they join it and leave it between any two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from lightning_softprompt.attachment import caches
from lightning_softprompt.attachment.growing_layer import GrowingLayer
from lightning_softprompt.base.padding import padded_inputs
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.serving.admission import in_passes
from lightning_softprompt.serving.rows import TextRow
from lightning_softprompt.serving.sampling import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = list[tuple[Tensor, Tensor]]  # keys and values of each layer, `[rows, heads, columns, size]`


class Batch:
    """The rows under way, and their keys and values side by side in one cache.

    New rows are read in a pass of their own, which gets their prompts from what the attachment keeps. Then prompt and
    text stand next to each other in each row, with pads in front of both, so that a row is what it is alone. The steps
    that follow are the bare model's: they do not ask which row has which prompt.

    Args:
        model: a causal LM with prompts attached, which keeps nothing but keys and values of its layers.
        pad: the id of pads.

    Attributes:
        rows: those under way.
    """

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.rows: list[TextRow] = []
        self._model: Any = model
        self._pad = pad
        self._mask: Tensor | None = None
        self._cache: Any = None
        traits = ModelTraits.of(model)
        self._cache_argument = traits.cache_argument
        self._last_alone = {"logits_to_keep": 1} if "logits_to_keep" in traits.arguments else {}
        # Of these models `generate` counts positions from 0, and not from where their own begin.
        self._counts_from_zero = traits.position_offset > 0

    @property
    def width(self) -> int:
        """The number of columns that the cache holds."""
        return 0 if self._mask is None else self._mask.shape[1]

    def passes(self, rows: Sequence[TextRow]) -> list[list[TextRow]]:
        """The rows that are to join together, in turn: those of like length."""
        return in_passes(rows, self._model.device.type)

    @torch.no_grad()
    def join(self, rows: Sequence[TextRow]) -> None:
        """Read new rows, all of them of the attached prompts. Each gets its first token, and stays if it needs more."""
        inputs = padded_inputs([row.request.ids for row in rows], self._pad, self._model.device)
        # Not the model's own kind of cache: that of a model with a window forgets what is outside of it.
        cache = DynamicCache()
        tasks = [row.request.task for row in rows]
        if self._counts_from_zero:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = self._run(inputs, cache, tasks=tasks, **self._last_alone)
        mask = caches.to_bare(cache, inputs["attention_mask"])
        self._accept(rows, out.logits)
        staying = [place for place, row in enumerate(rows) if not row.is_done]
        if staying:
            states, mask = _selected(_states(cache), mask, staying)
            states, mask = without_inner_pads(states, mask)
            self._put([*self.rows, *(rows[place] for place in staying)], *self._beside(states, mask))

    @torch.no_grad()
    def step(self) -> None:
        """Give each row its next token, and let those leave that have ended."""
        if self._mask is None:
            return
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        inputs = {"input_ids": torch.tensor([[row.last] for row in self.rows], device=self._mask.device)}
        if self._counts_from_zero:
            inputs["position_ids"] = self._mask.sum(1, keepdim=True) - 1
        out = self._run(inputs, self._cache, attention_mask=self._mask)
        self._accept(self.rows, out.logits)
        self._let_leave()

    def _let_leave(self) -> None:
        """Let rows leave that have ended, or for which nobody waits any more."""
        staying = [place for place, row in enumerate(self.rows) if not row.is_done]
        if not staying:
            self.clear()
        elif len(staying) < len(self.rows):
            assert self._mask is not None
            states, mask = _selected(_states(self._cache), self._mask, staying)
            width = int(mask.sum(1).max())
            states = [(keys[:, :, -width:], values[:, :, -width:]) for keys, values in states]
            self._put([self.rows[place] for place in staying], states, mask[:, -width:])

    def clear(self) -> None:
        """Forget all rows."""
        self.rows, self._mask, self._cache = [], None, None

    def _run(self, inputs: dict[str, Tensor], cache: Any, **more: Any) -> Any:
        return self._model(**inputs, **more, **{self._cache_argument: cache}, use_cache=True)

    def _accept(self, rows: Sequence[TextRow], logits: Tensor) -> None:
        for row, choice in zip(rows, choose(logits[:, -1], [row.sampler for row in rows]), strict=True):
            if not row.is_done:
                row.accept(choice)

    def _beside(self, states: States, mask: Tensor) -> tuple[States, Tensor]:
        """The states and the mask of the rows under way, with those of new rows behind them."""
        if self._mask is None:
            return states, mask
        width = max(mask.shape[1], self._mask.shape[1])
        pairs = zip(_states(self._cache), states, strict=True)
        together = [
            (_stacked(keys, new_keys, width), _stacked(values, new_values, width))
            for (keys, values), (new_keys, new_values) in pairs
        ]
        masks = (functional.pad(each, (width - each.shape[1], 0)) for each in (self._mask, mask))
        return together, torch.cat([*masks])

    def _put(self, rows: list[TextRow], states: States, mask: Tensor) -> None:
        cache = DynamicCache()
        cache.layer_class_to_replicate = GrowingLayer
        for layer, (keys, values) in enumerate(states):
            cache.update(keys, values, layer)
        caches.remember(cache, None)  # rows without prompts, for all that the model has to know
        self.rows, self._cache, self._mask = rows, cache, mask


def without_inner_pads(states: States, mask: Tensor) -> tuple[States, Tensor]:
    """States and mask with the columns of each row moved together, pads in front, and no more pads than needed.

    Args:
        states: of each layer.
        mask: `[rows, columns]`, zeros at pads, wherever they stand.
    """
    width = int(mask.sum(1).max())
    order = (mask != 0).long().argsort(dim=1, stable=True)[:, -width:]
    if bool((order == order[0, 0] + torch.arange(width, device=order.device)).all()):
        begin = int(order[0, 0])
        cut = [(keys.narrow(2, begin, width), values.narrow(2, begin, width)) for keys, values in states]
        return cut, mask.narrow(1, begin, width)
    return [(_columns(keys, order), _columns(values, order)) for keys, values in states], mask.gather(1, order)


def _columns(state: Tensor, order: Tensor) -> Tensor:
    return state.gather(2, order[:, None, :, None].expand(-1, state.shape[1], -1, state.shape[3]))


def _states(cache: Any) -> States:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _selected(states: States, mask: Tensor, rows: Sequence[int]) -> tuple[States, Tensor]:
    if len(rows) == len(mask):
        return states, mask
    chosen = torch.tensor(rows, device=mask.device)
    return [(keys[chosen], values[chosen]) for keys, values in states], mask[chosen]


def _stacked(state: Tensor, new: Tensor, width: int) -> Tensor:
    return torch.cat([functional.pad(each, (0, 0, width - each.shape[2], 0)) for each in (state, new)])

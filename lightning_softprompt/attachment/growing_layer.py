"""Keys and values of a layer that grow in place, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_COLUMNS = 32  # that room is made for at once


class GrowingLayer(DynamicLayer):
    """A layer of a `DynamicCache` that has room for further columns.

    transformers' own layer copies all that it holds whenever a token comes. This one writes the token behind it, and
    copies once in 32 tokens. It takes and tells the same, and its rows can be selected, repeated and cut as there.
    Where gradients are recorded it copies, too, because nothing may be written into what a graph holds.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._grown: Tensor | None = None  # the keys as the last update left them
        self._room: tuple[Tensor, Tensor] | None = None  # keys and values, with columns that are empty yet

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put new columns behind those that are held.

        Args:
            key_states: `[batch, heads, new columns, size]`.
            value_states: the same of values.
            args: not used.
            kwargs: not used.

        Returns:
            The keys and the values of all columns.
        """
        if torch.is_grad_enabled() or not self._takes(key_states):
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        held, new = self.get_seq_length(), key_states.shape[-2]
        if self._room is None or self.keys is not self._grown or held + new > self._room[0].shape[-2]:
            states = (key_states, self.keys), (value_states, self.values)
            keys, values = (_with_room(like, state, held, held + new) for like, state in states)
            self._room = keys, values
        keys, values = self._room
        keys.narrow(-2, held, new).copy_(key_states)
        values.narrow(-2, held, new).copy_(value_states)
        self.keys, self.values = keys.narrow(-2, 0, held + new), values.narrow(-2, 0, held + new)
        self._grown = self.keys
        return self.keys, self.values

    def _takes(self, new: Tensor) -> bool:
        """Whether new keys can be written behind those held; PyTorch lets inference mode alone write into its own."""
        if not self.is_initialized:
            self.lazy_initialization(new, new)
        held = self.keys
        assert held is not None
        is_alike = held.dtype == new.dtype and held.device == new.device
        return is_alike and held.is_inference() == torch.is_inference_mode_enabled()


def _with_room(like: Tensor, state: Tensor | None, held: int, columns: int) -> Tensor:
    room = like.new_empty((*like.shape[:-2], columns + _COLUMNS, like.shape[-1]))
    if state is not None and held:
        room.narrow(-2, 0, held).copy_(state)
    return room

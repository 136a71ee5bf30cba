"""Gradient checkpointing of a base that is kept in eval mode: activations are recomputed, dropout stays off.

transformers (5.23) checkpoints a layer in training mode alone, where its dropout is on, too. So a layer of an attached
model gets a `forward` of its own, which checkpoints where a pass asks for it, and always computes in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class GradientCheckpointing:
    """The layers that `model.gradient_checkpointing_enable()` turns to checkpointing; it may be called at any time.

    Args:
        model: the base.
        is_wanted: whether the pass that runs in this thread is to recompute its layers.
    """

    def __init__(self, model: nn.Module, is_wanted: Callable[[], bool]) -> None:
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._patched = [layer.__dict__.get("forward") for layer in self._layers]  # accelerate's, where it offloads
        self._ours = [partial(_forward, *each, is_wanted) for each in zip(self._layers, self._patched, strict=True)]
        for layer, ours in zip(self._layers, self._ours, strict=True):
            layer.__dict__["forward"] = ours

    @property
    def is_on(self) -> bool:
        """Whether the user has turned it on."""
        return any(layer.gradient_checkpointing for layer in self._layers)

    def remove(self) -> None:
        """Leave the layers as they were. A layer that somebody patched in the meantime stays patched."""
        for layer, patched, ours in zip(self._layers, self._patched, self._ours, strict=True):
            if layer.__dict__.get("forward") is not ours:
                continue
            del layer.__dict__["forward"]
            if patched is not None:
                layer.__dict__["forward"] = patched


def _forward(
    layer: Any, patched: Callable[..., Any] | None, is_wanted: Callable[[], bool], *args: Any, **kwargs: Any
) -> Any:
    forward = partial(type(layer).forward, layer) if patched is None else patched
    if layer.gradient_checkpointing and is_wanted():
        return layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)
    return forward(*args, **kwargs)

"""Gradient checkpointing of a base that is kept in eval mode: activations are recomputed, dropout stays off.

transformers (5.23) checkpoints a layer in training mode alone, where its dropout is on, too. So a layer of an attached
model gets a `forward` of its own, which checkpoints where a pass asks for it, and always computes in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class GradientCheckpointing:
    """The layers that `model.gradient_checkpointing_enable()` turns to checkpointing; it may be called at any time.

    Args:
        model: the base.
        is_wanted: whether the pass that runs in this thread is to recompute its layers.
    """

    def __init__(self, model: nn.Module, is_wanted: Callable[[], bool]) -> None:
        layers: list[Any] = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
        # What is there before may be accelerate's, which offloads, or that of another model that shares the base.
        patches = [_Patch(layer, layer.__dict__.get("forward"), is_wanted) for layer in layers]
        self._ours = [partial(_forward, patch) for patch in patches]
        for layer, ours in zip(layers, self._ours, strict=True):
            layer.__dict__["forward"] = ours

    @property
    def is_on(self) -> bool:
        """Whether a pass that begins now recomputes its layers: the user asks for it, and gradients are recorded."""
        return torch.is_grad_enabled() and any(ours.args[0].layer.gradient_checkpointing for ours in self._ours)

    def remove(self) -> None:
        """Leave the layers as they were. A layer that somebody patched in the meantime stays patched."""
        for ours in self._ours:
            patch: _Patch = ours.args[0]
            current = patch.layer.__dict__.get("forward")
            if current is ours:
                del patch.layer.__dict__["forward"]
                if patch.before is not None:
                    patch.layer.__dict__["forward"] = patch.before
            while isinstance(current, partial) and current.func is _forward and current is not ours:
                later: _Patch = current.args[0]  # that of a model which was attached after this one
                if later.before is ours:
                    later.before = patch.before
                current = later.before


@dataclass
class _Patch:
    """The `forward` of a layer: what stood there before, and whether the pass in this thread is to recompute it."""

    layer: Any
    before: Callable[..., Any] | None
    is_wanted: Callable[[], bool]


def _forward(patch: _Patch, *args: Any, **kwargs: Any) -> Any:
    layer = patch.layer
    forward = partial(type(layer).forward, layer) if patch.before is None else patch.before
    if layer.gradient_checkpointing and patch.is_wanted():
        return layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)
    return forward(*args, **kwargs)

"""Gradient checkpointing of a base that is kept in eval mode: activations are recomputed, dropout stays off.

transformers checkpoints a layer in training mode alone, where its dropout is on, too. Here the layer is in training
mode for as long as it takes to choose, and in eval mode whenever it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class GradientCheckpointing:
    """The layers of a model that `model.gradient_checkpointing_enable()` speaks to; it may be called at any time.

    Args:
        model: the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._functions: list[tuple[Any, Callable[..., Any]]] = []

    @property
    def is_on(self) -> bool:
        """Whether the user has turned it on."""
        return any(layer.gradient_checkpointing for layer in self._layers)

    def begin(self) -> None:
        """Have layers checkpoint themselves, from now to `end`."""
        for layer in self._layers:
            if layer.gradient_checkpointing:
                function = layer._gradient_checkpointing_func
                self._functions.append((layer, function))
                layer._gradient_checkpointing_func = partial(_in_eval_mode, layer, function)
                layer.training = True

    def end(self) -> None:
        """Leave the layers as they were."""
        while self._functions:
            layer, function = self._functions.pop()
            layer._gradient_checkpointing_func = function
            layer.training = False


def _in_eval_mode(layer: nn.Module, checkpoint: Callable[..., Any], run: Callable[..., Any], *inputs: Any) -> Any:
    def run_in_eval_mode(*given: Any) -> Any:
        """The layer's own pass, forward and when it is recomputed."""
        before, layer.training = layer.training, False
        try:
            return run(*given)
        finally:
            layer.training = before

    return checkpoint(run_in_eval_mode, *inputs)

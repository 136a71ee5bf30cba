"""Models that have prompts attached and use none, made where bare ones are, and what the passes of both give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_softprompt import Normal, SoftPrompts, attach

# Of each forward pass of a watched model: whether it was in training mode, and what came out.
PASSES: list[tuple[bool, Any]] = []


def watch(model: PreTrainedModel) -> None:
    """Put what the model's forward passes give into `PASSES`."""
    model.register_forward_hook(_keep_output)


def attach_and_watch(model: PreTrainedModel) -> None:
    """Attach two untrained tasks; the rows of a call that names no tasks have no prompt.

    What trained before trains again: that attaching freezes the base says nothing about what its passes give.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Before the attachment's own hook, so that this one runs first.
    model.register_forward_pre_hook(_without_prompts, with_kwargs=True)
    # Noise, as some tests leave no vocabulary to sample from.
    attach(model, SoftPrompts.for_model(model, {"a": Normal(3), "b": Normal(2)}, seed=0))
    for parameter in trained:
        parameter.requires_grad_(True)
    watch(model)


def _without_prompts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if {"task_ids", "tasks"}.isdisjoint(kwargs):
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        kwargs = {**kwargs, "task_ids": [-1] * len(next(tensors))}
    return args, kwargs


def _keep_output(model: nn.Module, args: Any, output: Any) -> None:
    PASSES.append((model.training, _copied(output)))


def _copied(output: Any) -> Any:
    """Tensors, and what holds them; of any other object its class."""
    if isinstance(output, torch.Tensor):
        return output.detach().clone()
    if isinstance(output, dict):
        return {name: _copied(value) for name, value in output.items()}
    if isinstance(output, (tuple, list)):
        return [_copied(value) for value in output]
    return type(output).__name__


def difference(bare: list[tuple[bool, Any]], attached: list[tuple[bool, Any]]) -> str:
    """What attached models gave otherwise than the bare ones in the same test; empty where nothing."""
    if len(bare) != len(attached):
        return f"{len(attached)} forward passes in place of {len(bare)}"
    for index, ((is_training, expected), (_, found)) in enumerate(zip(bare, attached, strict=True)):
        if is_training:
            continue  # with dropout, which an attached model has none of
        other = _other("output", found, expected)
        if other:
            return f"pass {index} gives something else: {other}"
    return ""


def _other(name: str, found: Any, expected: Any) -> str:
    """Where the first difference is, and which; empty where there is none."""
    if type(found) is not type(expected) or (isinstance(found, dict) and list(found) != list(expected)):
        return f"{name} is {_shown(found)} in place of {_shown(expected)}"
    if isinstance(found, torch.Tensor):
        try:
            torch.testing.assert_close(found, expected, equal_nan=True)
        except AssertionError as error:
            return f"{name}: {error}"
        return ""
    if isinstance(found, (dict, list)):
        if len(found) != len(expected):
            return f"{name} has {len(found)} entries in place of {len(expected)}"
        names = found if isinstance(found, dict) else range(len(found))
        return next(filter(None, (_other(f"{name}[{key!r}]", found[key], expected[key]) for key in names)), "")
    return "" if found == expected else f"{name} is {found} in place of {expected}"


def _shown(output: Any) -> str:
    return str(list(output)) if isinstance(output, dict) else type(output).__name__


@contextmanager
def each_model(model_class: type[PreTrainedModel], equip: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Inside, `equip` is called with every model of the class that has its weights: once made, or once loaded."""
    make, load = model_class.__init__, model_class.from_pretrained.__func__  # type: ignore[attr-defined]
    loading = 0

    @functools.wraps(make)
    def make_and_equip(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        make(model, *args, **kwargs)
        if not loading and not any(parameter.is_meta for parameter in model.parameters()):
            equip(model)

    @functools.wraps(load)
    def load_and_equip(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        nonlocal loading
        loading += 1
        try:
            loaded = load(cls, *args, **kwargs)
        finally:
            loading -= 1
        equip(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    with (
        patch.object(model_class, "__init__", make_and_equip),
        patch.object(model_class, "from_pretrained", classmethod(load_and_equip)),
    ):
        yield

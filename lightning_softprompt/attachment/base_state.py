"""What a frozen base computes, as far as it can be told without computing: the key of what is kept of prompts.

A key changes with weights and buffers (changed in place, replaced, moved, cast), with adapters of PEFT and their
scales, with hooks, with a `forward` that is patched onto a module, with the configuration and under autocast. Some
changes are invisible to it: a value that a patched function or a hook reads from elsewhere, and a weight that is
written through `.data`. Who makes such a change calls `Prefixes.clear()`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.prompts.soft_prompts import SoftPrompts

# Attributes of PEFT's layers that say which adapters are on, and how much they count.
_ADAPTER = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


@dataclass(frozen=True, eq=False)
class BaseState:
    """A key of the state of a base. Bases of equal keys compute the same, unless they differ where no key can look.

    Attributes:
        objects: weak references to modules and tensors, and patched functions. They are compared by identity, so that
            nothing new is taken for what is gone, though it may have its number and its memory.
        values: what else there is to compare.
    """

    objects: tuple[Any, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> BaseState:
        """The state of `model` without its soft prompts. It is made at every call, and so in one flat walk."""
        objects: list[Any] = []
        values: list[Any] = []
        for module in model.modules():
            if isinstance(module, SoftPrompts):
                continue
            own: dict[str, Any] = module.__dict__
            objects.append(weakref.ref(module))
            for kind in ("_parameters", "_buffers"):
                for tensor in own[kind].values():
                    if tensor is not None:
                        objects.append(weakref.ref(tensor))
                        values += (tensor.dtype, tensor.device, _version(tensor), _address(tensor))
            for kind in ("_forward_hooks", "_forward_pre_hooks"):
                values += own[kind]  # their numbers, which no other hook ever has
            if "forward" in own:
                objects.append(own["forward"])
            if "_active_adapter" in own:
                values.append(str([own.get(name) for name in _ADAPTER]))
        values += _settings(model.config)
        device = next(model.parameters()).device.type
        values.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
        return cls(tuple(objects), tuple(values))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BaseState)
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
            and self.values == other.values
        )

    __hash__ = None  # type: ignore[assignment]


def _settings(config: Any) -> Iterator[Any]:
    """The values of a configuration, and of the configurations inside it."""
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            yield from _settings(value)
        elif isinstance(value, int | float | str | dict | list | tuple):
            yield name, value if isinstance(value, int | float | str) else repr(value)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # quantized weights are several tensors
        return 0

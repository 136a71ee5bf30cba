"""What a frozen base computes, as far as it can be told without computing: the key of what is kept of prompts.

A key changes with weights and buffers (changed in place, replaced, moved, cast), with adapters of PEFT and their
scales, with hooks, with a `forward` that is patched onto a module, with the configuration and under autocast. Code can
hide from it: a value that a patched function or a hook reads from elsewhere. Who changes such a thing calls
`Prefixes.clear()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.prompts.soft_prompts import SoftPrompts

# Of PEFT's layers: which adapters are on, and how much they count.
_ADAPTER = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def base_state(model: nn.Module) -> tuple[object, ...]:
    """A key of the state of `model` without its soft prompts; equal keys compute the same, but for what hides.

    It is made at every call, and so in one flat walk.
    """
    key: list[object] = []
    for module in model.modules():
        if isinstance(module, SoftPrompts):
            continue
        own: dict[str, Any] = module.__dict__
        key.append(id(module))
        for kind in ("_parameters", "_buffers"):
            for tensor in own[kind].values():
                if tensor is not None:
                    key += (id(tensor), tensor.dtype, tensor.device, _version(tensor), _address(tensor))
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            key += own[kind]  # their numbers, which no other hook ever has
        if "forward" in own:
            key.append(id(own["forward"]))
        if "_active_adapter" in own:
            key.append(str([own.get(name) for name in _ADAPTER]))
    key += ((name, value) for name, value in vars(model.config).items() if isinstance(value, int | float | str))
    device = next(model.parameters()).device.type
    key.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
    return tuple(key)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # quantized weights are several tensors
        return 0

"""Numbers that the host knows, brought to a device by one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(device: torch.device, *numbers: Sequence[float], dtype: torch.dtype = torch.int64) -> tuple[Tensor, ...]:
    """Sequences of numbers as tensors `[length]` on `device`, one for each sequence.

    All of them go over in one copy. To a GPU it starts from pinned memory, and so the host does not wait until the
    device has done what it was told before, as it does for each `torch.tensor(…, device="cuda")`.
    """
    host = torch.tensor([number for sequence in numbers for number in sequence], dtype=dtype, device="cpu")
    if device.type == "cuda" and not torch.compiler.is_compiling():
        host = host.pin_memory()
    return host.to(device, non_blocking=True).split([len(sequence) for sequence in numbers])

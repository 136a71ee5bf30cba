"""Where a program would wait for a GPU, found on the CPU: what asks a tensor for its values, or copies a list to it."""

from __future__ import annotations

import collections
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
ASKING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "is_nonzero")
COPYING = ("tensor", "as_tensor", "new_tensor")
# Plain PyTorch's way of laying out, checks of values that are made on the CPU alone, data before it goes to a device,
# and the one way that lists go.
NOT_ON_A_GPU = (
    "softprompt_kernels/reference.py",
    "softprompt_kernels/arguments.py",
    "in valid_ids",
    "lightning_softprompt/data/",
    "lightning_softprompt/transfer.py",
)


class Waits(TorchFunctionMode):
    """The places of the project at which a GPU would be waited for, while this is entered, and how often.

    A tensor that was made on the CPU by name, with `device="cpu"`, stands on the CPU in the place of a GPU as well, and
    so do those that are computed from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: collections.Counter[str] = collections.Counter()
        self._on_the_host: set[int] = set()
        self._kept: list[Any] = []  # so that no other tensor gets the address of one of them

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        device = kwargs.get("device")
        is_host = (isinstance(device, str) and device == "cpu") or any(
            id(value) in self._on_the_host for value in given
        )
        is_by_mask = name == "__getitem__" and _has_a_mask(args[1])
        is_a_list = name in COPYING and not isinstance(args[-1], (bool, int, float, torch.Tensor))
        if (name in ASKING or is_by_mask or is_a_list) and not is_host:
            self._note(name)
        result = function(*args, **kwargs)
        if name == "to":  # to the device that the CPU stands for
            self._on_the_host.discard(id(result))
        elif is_host and isinstance(result, torch.Tensor):
            self._on_the_host.add(id(result))
            self._kept.append(result)
        return result

    def _note(self, name: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if ROOT not in path.parents or path == Path(__file__) or ".venv" in path.parts:
                if "site-packages" in path.parts and "torch" not in path.parts:
                    return  # another library's own
                continue
            place = f"{path.relative_to(ROOT).as_posix()} in {frame.name}"
            if path.parts[len(ROOT.parts)] != "tests" and not any(each in place for each in NOT_ON_A_GPU):
                self.places[f"{name}: {place}"] += 1
            return


def _has_a_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)

"""A processor that rounds otherwise, as a pytest plugin: `pytest -p tests.other_rounding`.

On many processors a matrix product rounds a row differently at another place of the batch, or in a batch of another
size. Where this machine does not, this plugin does: results of matrix products are moved by at most one unit in the
last place, which depends on the row's place and on the number of rows. The very same call gives the very same bits, as
it does everywhere; a test that asks for equal bits of anything else fails here, before it fails on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"}
_PRODUCTS |= {"linear", "matmul", "scaled_dot_product_attention"}  # in inference mode these come whole


class OtherRounding(TorchDispatchMode):
    """Moves the results of matrix products by the place of each row."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__.split(".")[-1] not in _PRODUCTS:
            return result
        first = result[0] if isinstance(result, tuple) else result
        with torch._C._DisableTorchDispatch():
            _move(first)
        return result


def _move(values: Tensor) -> None:
    if values.ndim < 2 or not values.is_floating_point() or not values.numel():
        return
    rows = values.shape[:-1].numel()
    place = torch.arange(rows, device=values.device)
    steps = ((place * 2654435761 + rows * 40503) >> 7) % 3 - 1
    eps = torch.finfo(values.dtype).eps
    values.mul_((1 + steps * eps).to(values.dtype).view(*values.shape[:-1], 1))


@pytest.fixture(autouse=True)
def other_rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs on that processor, but those of torch.compile, which refuses to be looked at."""
    with nullcontext() if request.node.get_closest_marker("compiles") else OtherRounding():
        yield

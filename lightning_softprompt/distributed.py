"""What the ranks of a distributed run have to do alike, whichever tasks their rows are of. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def has_several_ranks() -> bool:
    """Whether this process is one of several that train or evaluate together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(value: Any) -> list[Any]:
    """`value` of each rank, in their order; every rank has to call it."""
    if not has_several_ranks():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Let the gradients of `parameters` be their means over all ranks, in one reduction; every rank has to call it.

    Nobody else does it for prompts under FSDP2, which reduces the gradients of what it shards alone.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    mean = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(mean)
    mean /= distributed.get_world_size()
    for gradient, part in zip(gradients, mean.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def with_zero_gradients(value: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`value` unchanged, with a gradient of zeros for each of `others`.

    DistributedDataParallel waits on every rank for the gradient of every parameter, also of those that another rank's
    rows alone have a use for.
    """
    return _ZeroGradients.apply(value, *others)


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        """`value`; of the others nothing is read."""
        ctx.zeros = [(other.shape, other.dtype, other.device) for other in others]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradient of `value`, and zeros."""
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.zeros]
        return (*gradients, *zeros)

"""What all ranks of a distributed run must do together, whichever tasks their rows belong to. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def has_several_ranks() -> bool:
    """Whether this process is one of several that train or evaluate together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(value: Any) -> list[Any]:
    """The `value` of every rank, in the order of the ranks. Every rank must call this function."""
    if not has_several_ranks():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace the gradients of `parameters` by their means over all ranks, in one reduction. Every rank must call it.

    FSDP2 reduces only the gradients of the parameters that it shards, and it does not shard the prompts.
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
    """`value` unchanged; in the backward pass, each of `others` gets a gradient of zeros.

    PyTorch's DistributedDataParallel waits on every rank for the gradient of every parameter, even of one that only
    the rows of another rank use.
    """
    return _ZeroGradients.apply(value, *others)


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        """Return `value`. Only the shapes, dtypes and devices of `others` are kept."""
        ctx.zeros = [(other.shape, other.dtype, other.device) for other in others]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradient of `value`, then zeros for each of the others."""
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.zeros]
        return (*gradients, *zeros)

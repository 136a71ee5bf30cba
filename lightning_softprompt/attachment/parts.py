"""What the parts of a step leave that have gone forward and backward before its last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.errors import SoftPromptError


class EarlierParts:
    """What the parts that have run leave: the sum of their losses, and its gradients where the parts meet.

    Args:
        leaves: the tensors in which they meet, as the parts have them.
        origins: the same with their history.
        count: the targets that the loss is a mean over; None for those that are scored.
    """

    def __init__(self, leaves: Sequence[Tensor], origins: Sequence[Tensor], count: Any) -> None:
        self._leaves, self._origins, self._count = leaves, origins, count
        self._scored: Any = 0
        self._loss: Any = 0.0
        self._gradients: list[Tensor | None] = [None] * len(leaves)

    def add(self, loss: Tensor, scored: Tensor) -> None:
        """Add a part: the sum of its losses, whose graph is used up, and over how many targets it is."""
        found = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        for index, gradient in enumerate(found):
            if gradient is not None:  # of a task that has rows in this part; added up in float32
                before = self._gradients[index]
                self._gradients[index] = gradient.float() if before is None else before.add_(gradient)
        self._loss, self._scored = self._loss + loss.detach(), self._scored + scored

    def mean_with(self, loss: Tensor, scored: Tensor) -> Tensor:
        """The mean loss of all targets, the last part's included, with gradients of all parts."""
        met = [
            (origin, gradient.to(origin.dtype))
            for origin, gradient in zip(self._origins, self._gradients, strict=True)
            if gradient is not None and origin.requires_grad
        ]
        summed = _WithGradients.apply(self._loss, *(each for pair in met for each in pair))
        count = self._scored + scored if self._count is None else self._count
        mean: Tensor = (summed + loss) / (count.to(loss.device) if isinstance(count, Tensor) else count)
        return mean


class _WithGradients(torch.autograd.Function):
    """A number, and its gradients, which are known: tensors and what belongs to each, in turn."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise SoftPromptError(
                "gradients of gradients (create_graph=True) are not known; leave micro_batch_size out"
            )
        scaled = [(gradient * upstream).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return None, *(each for gradient in scaled for each in (gradient, None))

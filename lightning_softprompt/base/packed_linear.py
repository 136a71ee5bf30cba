"""Linear layers of a frozen base, with weights in the order in which the processor wants them."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def pack_linear_layers(model: nn.Module) -> None:
    """Let the linear layers of a frozen model multiply by oneDNN on a CPU, with weights that are packed once.

    PyTorch gives float32 products on a CPU to MKL, which packs the weights anew at each call and does not use all
    instructions of processors that are not Intel's. oneDNN, which PyTorch carries, too, took 0.35 to 0.5 of the time on
    an AMD EPYC, forward and backward. Sums are rounded in another order.

    Layers of type `torch.nn.Linear` in float32 on an x86 processor are packed; all others stay as they are. Packed
    weights are a second copy of them, and for training a third, in the other order. Where the weights are a mapped
    file, as safetensors' are in their own dtype, the system takes the memory of the first copy back when it is short.

    Args:
        model: one whose weights do not change any more, as a change would not be seen. Where a weight trains, under
            autocast, on a device and in `torch.compile` its layers multiply as before.

    Example:
        >>> layer = torch.nn.Linear(8, 4).requires_grad_(False)
        >>> rows = torch.ones(2, 8)
        >>> before = layer(rows)
        >>> pack_linear_layers(layer)
        >>> torch.allclose(layer(rows), before, atol=1e-6)
        True
    """
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return
    for layer in model.modules():
        # Subclasses keep their weights in ways of their own, and a forward of the layer's own is somebody's hook.
        if type(layer) is nn.Linear and "forward" not in vars(layer) and _can_be_packed(layer.weight):
            layer.forward = PackedProduct(layer)  # type: ignore[method-assign]


def _can_be_packed(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0


class PackedProduct:
    """The forward pass of one linear layer.

    Args:
        layer: whose weight is packed now, and for gradients when the first is asked for.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._weight, self._bias = layer.weight, layer.bias
        self._packed = {False: _reordered(self._weight.detach())}

    def __getstate__(self) -> dict[str, Any]:
        """The state without packed weights, which cannot be copied."""
        return {**self.__dict__, "_packed": {}}

    def __call__(self, input: Tensor) -> Tensor:
        trains = self._weight.requires_grad or (self._bias is not None and self._bias.requires_grad)
        is_plain = input.dtype == torch.float32 == self._weight.dtype and input.device == self._weight.device
        if (
            torch.compiler.is_compiling()
            or not is_plain
            or input.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and trains)
        ):
            return functional.linear(input, self._weight, self._bias)
        if torch.is_grad_enabled() and input.requires_grad:
            differentiable: Tensor = _Product.apply(input, self)
            return differentiable
        return self.product(input)

    def product(self, rows: Tensor) -> Tensor:
        """`rows`, `[…, in]`, by the layer: `[…, out]`."""
        return self._multiply(rows, self._bias, False)

    def gradient(self, upstream: Tensor) -> Tensor:
        """The gradient of rows whose products have the gradient `upstream`, `[…, out]`: `[…, in]`."""
        if torch.is_grad_enabled():  # one that is to be differentiated again
            return upstream @ self._weight
        return self._multiply(upstream, None, True)

    def _multiply(self, rows: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        if transposed not in self._packed:
            weight = self._weight.detach()
            self._packed[transposed] = _reordered(weight.t().contiguous() if transposed else weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed[transposed], bias, "none", [], "")
        return product


def _reordered(weight: Tensor) -> Tensor:
    # PyTorch's own compiler calls this operator and the product's for layers whose weights are frozen.
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: PackedProduct) -> Tensor:
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        layer: PackedProduct = ctx.layer
        return layer.gradient(upstream), None

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
        model: a frozen one. Its layers multiply as before where a weight trains, under autocast, on a device and in
            `torch.compile`. A weight that changes is packed anew, but for one that is written to through `.data`.

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
        self._layer = layer
        self._packed: tuple[_Version, dict[bool, Tensor]] | None = None
        self._multiply_by(False)

    def __getstate__(self) -> dict[str, Any]:
        """The state without packed weights, which cannot be copied."""
        return {**self.__dict__, "_packed": None}

    def __call__(self, input: Tensor) -> Tensor:
        if not self._can_multiply(input):
            return functional.linear(input, self._layer.weight, self._layer.bias)
        if torch.is_grad_enabled() and input.requires_grad:
            differentiable: Tensor = _Product.apply(input, self)
            return differentiable
        return self.product(input)

    def product(self, rows: Tensor) -> Tensor:
        """`rows`, `[…, in]`, by the layer: `[…, out]`."""
        return _multiply(rows, self._multiply_by(False), self._layer.bias)

    def gradient(self, upstream: Tensor) -> Tensor:
        """The gradient of rows whose products have the gradient `upstream`, `[…, out]`: `[…, in]`."""
        if torch.is_grad_enabled() or not self._can_multiply(upstream):  # one that is to be differentiated again
            return upstream @ self._layer.weight
        return _multiply(upstream, self._multiply_by(True), None)

    def _can_multiply(self, rows: Tensor) -> bool:
        weight, bias = self._layer.weight, self._layer.bias
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        is_plain = rows.dtype == torch.float32 and rows.device.type == "cpu" and _can_be_packed(weight)
        return is_plain and not (trains or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())

    def _multiply_by(self, transposed: bool) -> Tensor:
        """The packed weight. A weight that was replaced, moved or written to is packed anew."""
        weight = self._layer.weight.detach()
        version = _Version(self._layer.weight)
        if self._packed is None or self._packed[0] != version:
            self._packed = version, {}
        packed = self._packed[1]
        if transposed not in packed:
            # PyTorch's own compiler calls this operator and the product's for layers whose weights are frozen.
            order = weight.t().contiguous() if transposed else weight
            packed[transposed] = torch.ops.mkldnn._reorder_linear_weight(order)
        return packed[transposed]


class _Version:
    """Which weight it is, and how often it was written to; `.data` of the same memory is not seen."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._numbers = weight.data_ptr(), 0 if weight.is_inference() else weight._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Version) and self._weight is other._weight and self._numbers == other._numbers

    __hash__ = None  # type: ignore[assignment]


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: PackedProduct) -> Tensor:
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        layer: PackedProduct = ctx.layer
        return layer.gradient(upstream), None

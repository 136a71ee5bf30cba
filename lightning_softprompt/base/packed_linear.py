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
    is_plain = type(weight) in (Tensor, nn.Parameter)  # sharded and quantized ones are of other types
    return is_plain and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0


class PackedProduct:
    """The forward pass of one linear layer.

    Args:
        layer: whose weight is packed now, and for gradients when the first is asked for.
    """

    _weight: Tensor | None  # of which the packed ones are; None in a copy, whose layer has a weight of its own

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._pack(layer.weight)

    def __getstate__(self) -> dict[str, Any]:
        """The state without packed weights, which cannot be copied."""
        return {"_layer": self._layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy packs the weights of its own layer."""
        self._layer, self._weight = state["_layer"], None

    def _pack(self, weight: Tensor) -> None:
        self._packed = {False: _reordered(weight.detach())}
        self._weight = weight
        self._place, self._writes = weight.data_ptr(), _writes(weight)

    def __call__(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad and self._weights_for(input) is not None:
            differentiable: Tensor = _Product.apply(input, self)
            return differentiable
        return self.product(input)

    def product(self, rows: Tensor) -> Tensor:
        """`rows`, `[…, in]`, by the layer: `[…, out]`."""
        packed = self._weights_for(rows)
        if packed is None:
            return functional.linear(rows, self._layer.weight, self._layer.bias)
        return _multiply(rows, packed[False], self._layer._parameters["bias"])

    def gradient(self, upstream: Tensor) -> Tensor:
        """The gradient of rows whose products have the gradient `upstream`, `[…, out]`: `[…, in]`."""
        packed = None if torch.is_grad_enabled() else self._weights_for(upstream)
        if packed is None:  # among others where the gradient is to be differentiated again
            return upstream @ self._layer.weight
        if True not in packed:
            packed[True] = _reordered(self._layer.weight.detach().t().contiguous())
        return _multiply(upstream, packed[True], None)

    def _weights_for(self, rows: Tensor) -> dict[bool, Tensor] | None:
        """The packed weights, and under True their transpose once it was needed; None where rows multiply as before.

        This runs for every layer and token, so that it reads the module's dictionary, and asks for the least first. A
        weight that was replaced, moved or written to is packed anew.
        """
        weight, bias = self._layer._parameters.get("weight"), self._layer._parameters.get("bias")
        if (
            weight is None
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or rows.dtype != torch.float32
            or not rows.is_cpu
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return None
        if weight is not self._weight or weight.data_ptr() != self._place or _writes(weight) != self._writes:
            if not _can_be_packed(weight):
                return None
            self._pack(weight)
        return self._packed


def _writes(weight: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not say."""
    return 0 if weight.is_inference() else weight._version


def _reordered(weight: Tensor) -> Tensor:
    # PyTorch's own compiler calls this operator and the product's for layers whose weights are frozen.
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


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

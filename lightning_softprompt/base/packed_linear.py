"""Linear layers of a base that is only read, with weights in the order in which the processor wants them."""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn
from torch.nn import functional


def pack_linear_layers(model: nn.Module) -> None:
    """Let the linear layers of a model multiply by oneDNN, with weights that are packed once.

    PyTorch gives float32 products on a CPU to MKL, which packs the weights anew at each call and does not use all
    instructions of processors that are not Intel's. oneDNN, which PyTorch carries, too, took 0.42 of the time with 32
    rows of SmolLM2-135M on an AMD EPYC, and 0.44 with 512. Sums are rounded in another order.

    Layers of type `torch.nn.Linear` in float32 on an x86 processor are packed; all others stay as they are. Packed
    weights are a second copy of them. Where the weights are a mapped file, as safetensors' are in their own dtype, the
    system takes the memory of the first copy back when it is short of it.

    Args:
        model: one whose weights do not change any more, as a change would not be seen. Where gradients are recorded, or
            under autocast, its layers multiply as before.
    """
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return
    for layer in model.modules():
        # Subclasses keep their weights in ways of their own, and a forward of the layer's own is somebody's hook.
        if type(layer) is nn.Linear and "forward" not in vars(layer) and _can_be_packed(layer.weight):
            layer.forward = _PackedProduct(layer)  # type: ignore[method-assign]


def _can_be_packed(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0


class _PackedProduct:
    """The forward pass of one linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self._weight, self._bias = layer.weight, layer.bias
        # PyTorch's own compiler calls these two operators for layers whose weights are frozen.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach())

    def __call__(self, input: Tensor) -> Tensor:
        is_plain = input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if torch.is_grad_enabled() or not is_plain:
            return functional.linear(input, self._weight, self._bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self._bias, "none", [], "")
        return product

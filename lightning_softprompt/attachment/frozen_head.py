"""The cross-entropy behind a frozen head, whose gradient is made in the forward pass, so that few logits exist at once.

A head that does not train needs no gradient of its own. What a hidden state's gradient takes are the probabilities of
its own position, so each chunk of positions can be finished before the next one begins: as many operations as the plain
way, and the memory of one chunk's logits in place of three copies of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_softprompt.attachment.base_state import BaseState
from lightning_softprompt.attachment.substitution import Substitution
from lightning_softprompt.base.model_types import NO_BACKWARD, reason
from lightning_softprompt.base.packed_linear import PackedProduct
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError

_CHUNKS, _LEAST_ROWS = 8, 64  # so many chunks, unless a chunk then has fewer rows than a product needs to be fast


class FrozenHead:
    """Whether a model's logits are the product of its frozen head and nothing else, which is found out by one token.

    Some models cap or scale what the head puts out, some compute another loss, and some heads are quantized, sharded or
    adapted. Their loss is computed from all logits.

    Args:
        traits: of the model.
        run: calls the model with arguments by name, in one pass with a substitution.
    """

    def __init__(self, traits: ModelTraits, run: Callable[[dict[str, Any], Substitution], Any]) -> None:
        self._traits = traits
        self._run = run
        self._known: tuple[Any, bool] | None = None  # for which state of the model, and the answer

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is known, as a copy belongs to another model."""
        return {**self.__dict__, "_known": None}

    def is_plain(self) -> bool:
        """Whether the loss can be computed from the head's input; the model runs on one token to find out, and once."""
        model = self._traits.model
        head = model.get_output_embeddings()
        has_usual_loss = model.loss_function is ForCausalLMLoss and not reason(NO_BACKWARD, model.config)
        if not has_usual_loss or not _can_be_read(head):
            return False
        numbers = [(name, value) for name, value in vars(model).items() if isinstance(value, int | float)]
        state = BaseState.of(model), numbers
        if self._known is None or self._known[0] != state:
            is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
            self._known = state, not is_sharded and self._is_alone(head)
        return self._known[1]

    @torch.no_grad()
    def _is_alone(self, head: nn.Linear) -> bool:
        token = torch.full((1, 1), self._traits.placeholder, device=head.weight.device)
        given = {"input_ids": token, "attention_mask": torch.ones_like(token), "return_dict": True}
        call = {name: value for name, value in given.items() if name in self._traits.arguments or name == "return_dict"}
        this = _Recording()
        logits = self._run(call, this).logits
        if this.hidden is None:
            return False
        # The same tensors go through the same product once more, so that bits may be compared.
        expected = head.forward(this.hidden)
        return logits.shape == expected.shape and torch.equal(logits, expected.to(logits.dtype))


class _Recording(Substitution):
    """A pass that changes nothing, and keeps what the head is given."""

    def select_hidden(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden


def summed_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """The sum of the cross-entropy of `targets` by what a frozen `head` makes of `hidden`.

    Args:
        hidden: `[positions, hidden]`.
        head: whose weight and bias do not train.
        targets: int64 `[positions]`, each of them a token.

    Returns:
        A scalar in nats, float32.
    """
    loss: Tensor = _SummedCrossEntropy.apply(hidden, head, targets)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(_LEAST_ROWS, -(-len(hidden) // _CHUNKS))
        for begin in range(0, len(hidden), rows):
            part, wanted = hidden[begin : begin + rows], targets[begin : begin + rows, None]
            given = head.forward(part)
            logits = given.float()
            normalizer = logits.logsumexp(1, keepdim=True)
            total += (normalizer - logits.gather(1, wanted)).sum()
            if gradient is not None:
                probabilities = logits.sub_(normalizer).exp_()
                probabilities.scatter_add_(1, wanted, probabilities.new_full(wanted.shape, -1.0))
                gradient[begin : begin + rows] = _to_hidden(head, probabilities.to(given.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise SoftPromptError(
                "gradients of gradients (create_graph=True) need all logits; attach with logits='all'"
            )
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None


def _to_hidden(head: nn.Linear, upstream: Tensor) -> Tensor:
    packed = vars(head).get("forward")
    return packed.gradient(upstream) if isinstance(packed, PackedProduct) else upstream @ head.weight


def _can_be_read(head: nn.Module | None) -> bool:
    """Whether a head is an ordinary frozen linear layer, with its whole weight at hand and nobody else's hooks.

    A float16 head is none here: its gradients lose small probabilities unless the loss scale is part of them.
    """
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    is_changed = not isinstance(head.__dict__.get("forward"), PackedProduct | None)
    if is_changed or head._forward_hooks or head._backward_hooks or head._backward_pre_hooks:
        return False
    if len(head._forward_pre_hooks) > 1:  # one of them is the attachment's
        return False
    weight = head.weight
    is_whole = type(weight) is nn.Parameter and weight.shape == (head.out_features, head.in_features)
    if not is_whole or weight.device.type == "meta":
        return False
    return not computes_in_float16(weight)


def computes_in_float16(weight: Tensor) -> bool:
    """Whether a product with this weight is one of float16 numbers, by its own dtype or by autocast."""
    device = weight.device.type
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.float16 in (weight.dtype, torch.get_autocast_dtype(device) if autocasts else None)

"""While prompts are attached the base is frozen and in eval mode; several models may share it."""

from __future__ import annotations

import weakref

from torch import nn

_HELD: weakref.WeakSet[FrozenBase] = weakref.WeakSet()


class FrozenBase:
    """What the parameters and modules of a model were before they were frozen.

    Of several models that share a base, each freezes it when prompts are attached. What the base was before the first
    of them comes back with the last that is detached, in whatever order.

    Args:
        model: is frozen and put into eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._modes = {name: module.training for name, module in model.named_modules()}
        model.requires_grad_(False)
        model.eval()
        _HELD.add(self)

    def restore(self) -> None:
        """Make the model what it was, except for the parts that another one still keeps frozen."""
        _HELD.discard(self)
        for other in list(_HELD):
            self._hand_over(other)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        for name, module in self._model.named_modules():
            module.training = self._modes.get(name, module.training)

    def _hand_over(self, other: FrozenBase) -> None:
        """Leave the parts of both models frozen, and let `other` restore the state that they had here."""
        parameters = {id(each): name for name, each in other._model.named_parameters()}
        modules = {id(each): name for name, each in other._model.named_modules()}
        for name, parameter in self._model.named_parameters():
            _move(self._required_grad, name, other._required_grad, parameters.get(id(parameter)))
        for name, module in self._model.named_modules():
            _move(self._modes, name, other._modes, modules.get(id(module)))


def _move(mine: dict[str, bool], my_name: str, theirs: dict[str, bool], their_name: str | None) -> None:
    if their_name is not None and my_name in mine:
        theirs[their_name] = theirs.get(their_name, False) or mine[my_name]
        mine[my_name] = False

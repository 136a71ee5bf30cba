"""What the gradient callbacks share: their order in an optimizer's step, and the prompts that it is about to move."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.attachment.attachment import Attachment
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.training.callback import SoftPromptCallback

if TYPE_CHECKING:
    from lightning_softprompt.prompts.soft_prompts import SoftPrompts


class GradientStage(Callback):
    """A callback that acts on the prompts' gradients, in this order whatever that of the Trainer's callbacks.

    First `SoftPromptCallback` takes the gradients of absent tasks away, then gradients are measured, then those that
    would do harm are dropped, then the rest is clipped. Lightning's own clipping comes after all callbacks.

    Attributes:
        order: among the stages.
    """

    order: ClassVar[int]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the Trainer's callbacks into the order in which gradients pass through them."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        slots = [i for i, callback in enumerate(callbacks) if isinstance(callback, SoftPromptCallback | GradientStage)]
        ordered = sorted((callbacks[slot] for slot in slots), key=lambda callback: getattr(callback, "order", -1))
        # A new list: the old one is being iterated over.
        arranged = list(callbacks)
        for slot, callback in zip(slots, ordered, strict=True):
            arranged[slot] = callback
        trainer.callbacks = arranged  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to run without prompts."""
        self.attachment(pl_module)

    def attachment(self, pl_module: LightningModule) -> Attachment:
        """The attachment of the module's causal LM.

        Raises:
            SoftPromptError: no soft prompts are attached.
        """
        for module in pl_module.modules():
            found = attachment_of(module)
            if found is not None:
                return found
        raise SoftPromptError(
            f"{type(self).__name__} found no soft prompts in {type(pl_module).__name__}; add "
            "SoftPromptCallback(tasks=…) to the Trainer"
        )

    def check_gradients_are_unscaled(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Refuse an optimizer that unscales gradients itself, after every hook."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise SoftPromptError(
                f"{type(optimizer).__name__}(fused=True) unscales gradients of precision '16-mixed' inside its step, "
                f"where {type(self).__name__} cannot see them; make it with fused=False, or use 'bf16-mixed'"
            )


def about_to_move(optimizer: Optimizer, prompts: SoftPrompts) -> dict[str, nn.Parameter]:
    """The prompts that the optimizer's next step moves, by task: those it holds that have a gradient.

    In the order of names, as sums over tasks round by their order.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    return {task: prompts[task] for task in sorted(prompts) if id(prompts[task]) in held}


def holds(optimizer: Optimizer, prompt: nn.Parameter) -> bool:
    """Whether the optimizer is the one that moves the prompt."""
    return any(prompt is parameter for group in optimizer.param_groups for parameter in group["params"])


def optimizer_step(trainer: Trainer) -> int:
    """The step that loggers put on the x axis: batches that ended in a step, whatever the number of optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped

"""The common part of the gradient callbacks: their order, and the prompts that an optimizer is about to change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_softprompt.attachment.attach import attachment_inside
from lightning_softprompt.attachment.attachment import Attachment
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.training.callback import SoftPromptCallback
from lightning_softprompt.training.wiring import prompts_in

if TYPE_CHECKING:
    from lightning_softprompt.prompts.soft_prompts import SoftPrompts


class GradientStage(Callback):
    """A callback that acts on the prompts' gradients. The order of the stages does not depend on the Trainer's list.

    First `SoftPromptCallback` removes the gradients of tasks without rows. Then `PromptGradientNorm` (order 0) measures
    the gradients, `CollapseGuard` (order 1) drops harmful ones, and `PromptGradientClipping` (order 2) clips the rest.
    Lightning's own clipping comes after all callbacks.

    What a stage has seen of prompts goes on in another run of these, and in one that resumes. Other prompts, as those
    of the next fold, start anew.

    Attributes:
        order: the place of a class of callbacks among the stages.
    """

    order: ClassVar[int]
    _seen_of: SoftPrompts | None = None  # the prompts of the last run
    _handles: Sequence[Any] = ()  # of the hooks of optimizers

    def forget(self) -> None:
        """Forget what was seen of the prompts of an earlier run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the stages behind `SoftPromptCallback`, by their order.

        The others keep theirs, as `SoftPromptCallback` has to know which of them Lightning has set up before it.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        stages = [callback for callback in callbacks if isinstance(callback, GradientStage)]
        others = [callback for callback in callbacks if not isinstance(callback, GradientStage)]
        place = next((at for at, each in enumerate(others, 1) if isinstance(each, SoftPromptCallback)), 0)
        # Lightning is iterating over the old list, so the order is changed in a new one.
        arranged = [*others[:place], *sorted(stages, key=lambda callback: callback.order), *others[place:]]
        trainer.callbacks = arranged  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew if the prompts are others than those of the last run."""
        prompts = self.attachment(pl_module).prompts
        if self._seen_of is not None and self._seen_of is not prompts and trainer.ckpt_path is None:
            self.forget()
        self._seen_of = prompts

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks from the optimizers."""
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks from the optimizers."""
        self._remove_hooks()

    def _run_after_steps(self, trainer: Trainer, hook: Callable[[Optimizer, Any, Any], None]) -> None:
        """Run `hook` after each step of the Trainer's optimizers until training ends."""
        self._remove_hooks()
        self._handles = [optimizer.register_step_post_hook(hook) for optimizer in trainer.optimizers]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def attachment(self, pl_module: LightningModule) -> Attachment:
        """The attachment of the module's causal LM.

        Raises:
            SoftPromptError: no prompts are attached.
        """
        found = attachment_inside(pl_module)
        if found is not None:
            return found
        raise SoftPromptError(
            f"{type(self).__name__} found no soft prompts in {type(pl_module).__name__}; add "
            "SoftPromptCallback(tasks=…) to the Trainer"
        )

    def check_gradients_are_unscaled(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Raise a `SoftPromptError` for an optimizer that unscales gradients inside its step, after all hooks."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise SoftPromptError(
                f"{type(optimizer).__name__}(fused=True) unscales gradients of precision '16-mixed' inside its step, "
                f"where {type(self).__name__} cannot see them; make it with fused=False, or use 'bf16-mixed'"
            )


def about_to_move(optimizer: Optimizer, prompts: SoftPrompts) -> dict[str, nn.Parameter]:
    """The prompts that the optimizer's next step changes, by task: those that it holds and that have a gradient."""
    return {task: prompt for task, prompt in prompts_in(optimizer, prompts).items() if prompt.grad is not None}


def optimizer_step(trainer: Trainer) -> int:
    """The step number that loggers use: the number of batches that ended in a step, for any number of optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped

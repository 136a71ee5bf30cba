"""The health of training: callbacks that log gradients, clip them, and recover prompts that collapse."""

from lightning_softprompt.gradients.clipping import PromptGradientClipping
from lightning_softprompt.gradients.guard import CollapseGuard
from lightning_softprompt.gradients.norms import PromptGradientNorm

__all__ = ["CollapseGuard", "PromptGradientClipping", "PromptGradientNorm"]

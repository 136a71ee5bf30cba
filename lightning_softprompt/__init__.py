"""Prompt tuning for Lightning: many tasks, one frozen Hugging Face causal LM, mixed in one batch."""

from lightning_softprompt.attachment.attach import attach, detach
from lightning_softprompt.data.datamodule import TaskDataModule
from lightning_softprompt.data.sources import Source
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.gradients import CollapseGuard, PromptGradientClipping, PromptGradientNorm
from lightning_softprompt.inference.generator import MixedTaskGenerator
from lightning_softprompt.prompts.initializers import Labels, Normal, Prompt, Text, Tokens, Vocabulary
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.prompts.templates import TaskTemplate
from lightning_softprompt.training.callback import SoftPromptCallback
from lightning_softprompt.training.module import CausalLMModule
from lightning_softprompt.training.per_task import PerTask

__all__ = [
    "CausalLMModule",
    "CollapseGuard",
    "Labels",
    "MixedTaskGenerator",
    "Normal",
    "PerTask",
    "Prompt",
    "PromptGradientClipping",
    "PromptGradientNorm",
    "SoftPromptCallback",
    "SoftPromptError",
    "SoftPrompts",
    "Source",
    "TaskDataModule",
    "TaskTemplate",
    "Text",
    "Tokens",
    "Vocabulary",
    "attach",
    "detach",
]

"""Prompt tuning for Lightning: many tasks, one frozen Hugging Face causal LM, mixed in one batch.

A name is loaded when it is first used (PEP 562). So code that only attaches prompts to a model does not import
Lightning, and the command line answers `--help` without importing PyTorch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_softprompt.attachment.attach import attach, detach
    from lightning_softprompt.base.packed_linear import pack_linear_layers
    from lightning_softprompt.data.datamodule import TaskDataModule
    from lightning_softprompt.data.sources import Source
    from lightning_softprompt.errors import SoftPromptError
    from lightning_softprompt.gradients.clipping import PromptGradientClipping
    from lightning_softprompt.gradients.guard import CollapseGuard
    from lightning_softprompt.gradients.norms import PromptGradientNorm
    from lightning_softprompt.inference.answers import Answer
    from lightning_softprompt.inference.generator import MixedTaskGenerator
    from lightning_softprompt.prompts.initializers import Labels, Normal, Prompt, Text, Tokens, Vocabulary
    from lightning_softprompt.prompts.soft_prompts import SoftPrompts
    from lightning_softprompt.prompts.templates import TaskTemplate
    from lightning_softprompt.training.best_prompts import BestPrompts
    from lightning_softprompt.training.callback import SoftPromptCallback
    from lightning_softprompt.training.distillation import PromptDistillation
    from lightning_softprompt.training.module import CausalLMModule
    from lightning_softprompt.training.objectives import label_loss
    from lightning_softprompt.training.per_task import PerTask

try:
    __version__ = version("lightning-softprompt")
except PackageNotFoundError:  # the package is imported from its sources and is not installed
    __version__ = "unknown"

_ROOMS = {
    "Answer": "inference.answers",
    "BestPrompts": "training.best_prompts",
    "CausalLMModule": "training.module",
    "CollapseGuard": "gradients.guard",
    "Labels": "prompts.initializers",
    "MixedTaskGenerator": "inference.generator",
    "Normal": "prompts.initializers",
    "PerTask": "training.per_task",
    "Prompt": "prompts.initializers",
    "PromptDistillation": "training.distillation",
    "PromptGradientClipping": "gradients.clipping",
    "PromptGradientNorm": "gradients.norms",
    "SoftPromptCallback": "training.callback",
    "SoftPromptError": "errors",
    "SoftPrompts": "prompts.soft_prompts",
    "Source": "data.sources",
    "TaskDataModule": "data.datamodule",
    "TaskTemplate": "prompts.templates",
    "Text": "prompts.initializers",
    "Tokens": "prompts.initializers",
    "Vocabulary": "prompts.initializers",
    "attach": "attachment.attach",
    "detach": "attachment.attach",
    "label_loss": "training.objectives",
    "pack_linear_layers": "base.packed_linear",
}

__all__ = [
    "Answer",
    "BestPrompts",
    "CausalLMModule",
    "CollapseGuard",
    "Labels",
    "MixedTaskGenerator",
    "Normal",
    "PerTask",
    "Prompt",
    "PromptDistillation",
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
    "label_loss",
    "pack_linear_layers",
]


def __getattr__(name: str) -> Any:
    if name == "gradients":  # so that `lightning_softprompt.gradients.CollapseGuard` works without another import
        return import_module(f"{__name__}.gradients")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

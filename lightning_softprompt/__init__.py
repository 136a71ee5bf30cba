"""Prompt tuning for Lightning: many tasks, one frozen Hugging Face causal LM, mixed in one batch."""

from lightning_softprompt.attachment import attach, detach
from lightning_softprompt.callback import SoftPromptCallback
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.init import Labels, Normal, Prompt, Text, Tokens, Vocabulary
from lightning_softprompt.prompts import SoftPrompts

__all__ = [
    "Labels",
    "Normal",
    "Prompt",
    "SoftPromptCallback",
    "SoftPromptError",
    "SoftPrompts",
    "Text",
    "Tokens",
    "Vocabulary",
    "attach",
    "detach",
]

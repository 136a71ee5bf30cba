"""Soft prompts of many tasks, laid out in front of the rows of one batch. Depends on torch and triton alone."""

from softprompt_kernels.concat import prompt_concat
from softprompt_kernels.reference import PromptConcat

__all__ = ["PromptConcat", "prompt_concat"]

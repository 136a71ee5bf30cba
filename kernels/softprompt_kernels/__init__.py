"""Laying out soft prompts of many tasks in front of the rows of one batch. Only torch and Triton are needed."""

from softprompt_kernels.concat import prompt_concat
from softprompt_kernels.reference import PromptConcat

__all__ = ["PromptConcat", "prompt_concat"]

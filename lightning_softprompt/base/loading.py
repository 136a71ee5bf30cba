"""Loading base models and tokenizers. Errors name what could not be loaded and say what to do.

Code that comes with a base runs only where the caller asks for it with `trust_remote_code=True`: without that argument,
transformers asks on the terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.errors import SoftPromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MEND = "give the id of a model on the hub, or the folder of one saved with save_pretrained"


def load_causal_lm(source: str | Path, **options: Any) -> PreTrainedModel:
    """Load a causal LM by hub id or path; `options` are passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        SoftPromptError: there is no such model, it needs code of its own, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, **{"trust_remote_code": False, **options})
    except Exception as error:  # of a file that is damaged, errors are of many types
        raise SoftPromptError(_about("causal LM", source, error)) from error


def load_tokenizer(source: str | Path, **options: Any) -> Any:
    """Load a tokenizer by hub id or path; `options` are passed to `AutoTokenizer.from_pretrained`.

    Raises:
        SoftPromptError: there is no such tokenizer, it needs code of its own, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **options})
    except Exception as error:
        raise SoftPromptError(_about("tokenizer", source, error)) from error


def _about(what: str, source: str | Path, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"the {what} in {str(source)!r} needs code that comes with it, which is not run; in Python, load it with "
            "trust_remote_code=True if you trust that code, and give the loaded object"
        )
    if str(source).startswith(("/", ".")) and not Path(source).exists():  # of a path, the hub's words say nothing
        return f"no {what} could be loaded from {str(source)!r}; {_MEND} (there is no folder of that name)"
    return f"no {what} could be loaded from {str(source)!r}; {_MEND} ({error})"

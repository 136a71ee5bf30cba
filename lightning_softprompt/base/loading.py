"""Loading base models and tokenizers. Errors name what could not be loaded and say what to do."""

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
        SoftPromptError: there is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise SoftPromptError(f"no causal LM could be loaded from {str(source)!r}; {_MEND} ({error})") from error


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer by hub id or path.

    Raises:
        SoftPromptError: there is no such tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SoftPromptError(f"no tokenizer could be loaded from {str(source)!r}; {_MEND} ({error})") from error

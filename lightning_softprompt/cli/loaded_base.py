"""The base model of a command, on the device that its options name."""

from __future__ import annotations

from typing import Any

from lightning_softprompt.errors import SoftPromptError


def loaded_base(base: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer.

    Args:
        base: hub id or path of the model.
        device: of the model, such as "cuda:1"; "auto" is a GPU where there is one.
        dtype: of the model, such as "bfloat16"; "auto" is that of its files.

    Returns:
        The model and the tokenizer.

    Raises:
        SoftPromptError: there is no such model, dtype or device.
    """
    import torch

    from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise SoftPromptError(f"{dtype!r} is no dtype of weights; give auto, float32, bfloat16 or float16")
    model: Any = load_causal_lm(base, dtype=dtype)
    try:
        return model.to(device), load_tokenizer(base)
    except (RuntimeError, AssertionError) as error:
        raise SoftPromptError(f"the model cannot be put on {device!r} ({error}); give another device") from error

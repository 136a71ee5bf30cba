"""What vLLM's configuration says of the served model, and where its files lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softprompt_vllm.base_model import ServedModel


def served_model(config: Any) -> ServedModel:
    """Describe the model of vLLM's `ModelConfig`."""
    return ServedModel(
        name=str(config.model),
        folder=_folder(str(config.model), config.revision),
        hidden_size=config.get_inputs_embeds_size(),
        vocabulary=config.get_vocab_size(),
        dtype=config.dtype,
        takes_embeddings=bool(config.enable_prompt_embeds),
    )


def _folder(model: str, revision: str | None) -> Path | None:
    """The folder of a model that vLLM has loaded; None for one that is neither a folder nor in the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None

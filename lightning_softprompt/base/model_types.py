"""Every exception for a type of model, in one place, each with its reason: `config.model_type`, and why."""

from __future__ import annotations

from typing import Any

_NO_ID = "and virtual tokens have no id"
_PER_LAYER = f"it has embeddings per layer, looked up by id, {_NO_ID}"
_ASSISTS = "it reads hidden states and keys of the model it assists"

# Refused: most of them read token ids beside the embeddings.
NO_SOFT_PROMPT = {
    "blt": f"it groups the bytes of the ids into patches, {_NO_ID}",
    "cpmant": f"it builds its inputs from the ids, {_NO_ID}",
    "deepseek_v4": f"it routes experts by a hash of the ids, {_NO_ID}",
    "gemma3n": _PER_LAYER,
    "gemma3n_text": _PER_LAYER,
    "gemma4": _PER_LAYER,
    "gemma4_text": _PER_LAYER,
    "gemma4_assistant": _ASSISTS,
    "gemma4_unified_assistant": _ASSISTS,
    "prophetnet": "it reads pads, so padded rows are not exact",
}
# They take no positions, and yet pads may stand in front of their rows.
PADDED_ON_THE_LEFT = {"bloom": "its attention bias counts what the mask holds"}
# They take positions, and yet their rows have to begin at the first column: pads go on the right.
PADDED_ON_THE_RIGHT = {
    "git": "behind a cache it puts the columns of an image in front of the mask, where pads would stand",
    "minimax_m3_vl_text": "its sparse index counts columns",
    "recurrent_gemma": "its convolution and its recurrence read pads",
    "reformer": "it cuts columns into chunks",
}
# Their cache cannot be continued.
NO_CONTINUATION = {"reformer": "that holds buckets of hashes, not columns"}
# Their prompts go into the sequence of every row, never into the cache.
NO_PREFIX = {"moshi": "it masks other columns than its cache keeps"}
# Pads between prompt and text count as distance, whatever the window.
DISTANCE_IN_COLUMNS = {"mpt": "its attention bias counts columns"}


def reason_against_soft_prompts(config: Any) -> str | None:
    """Why a model of this configuration takes no soft prompts; None where it does."""
    if "lsh" in getattr(config, "attn_layers", ()):  # Reformer's
        return "what its hashes of a row depend on is the padded width, so padded rows are not exact"
    return NO_SOFT_PROMPT.get(config.model_type)

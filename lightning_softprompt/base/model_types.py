"""Every exception for a type of model, in one place, each with its reason.

A table maps `config.model_type`, of the whole model or of its text part, to why; `reason` looks a model up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_ID = "and virtual tokens have no id"
_PER_LAYER = f"it has embeddings per layer, looked up by id, {_NO_ID}"
_ASSISTS = "it reads hidden states and keys of the model it assists"
_HIDES_NO_PADS = "its causal mask hides no pads"
_COUNTS_MASK = "its positions count what the mask holds"
_PADS = "it looks up the ids of images and sounds as those of pads"

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
    "kosmos-2.5": "its positions begin behind the id of its pad token, unlike those that generate counts",
    "prophetnet": "it reads pads, so padded rows are not exact",
}
# They take no positions, and yet pads may stand in front of their rows.
PADDED_ON_THE_LEFT = {"bloom": "its attention bias counts what the mask holds"}
# They take positions, and yet their rows have to begin at the first column: pads go on the right.
PADDED_ON_THE_RIGHT = {
    "flaubert": _HIDES_NO_PADS,
    "git": "behind a cache it puts the columns of an image in front of the mask, where pads would stand",
    "minimax_m3_vl_text": "its sparse index counts columns",
    "recurrent_gemma": "its convolution and its recurrence read pads",
    "reformer": "it cuts columns into chunks",
    "xlm": _HIDES_NO_PADS,
}
# Their positions begin with 1.
POSITIONS_FROM_ONE = {"paligemma": "transformers counts its positions from 1"}
# Of rows without prompts, which may have masks of any form, they count positions by themselves.
OWN_POSITIONS = {"biogpt": _COUNTS_MASK, "opt": _COUNTS_MASK}
# Their embedding is left to look up the ids of a text by itself.
OWN_LOOK_UP = {"gemma4_unified": _PADS, "gemma4_unified_text": _PADS}
# Their cache cannot be continued; they generate without.
NO_CONTINUATION = {
    "reformer": "that holds buckets of hashes, not columns",
    "rwkv": "that is a list, and nothing tells which rows it is of",
    "unlimited_ocr": "that counts the columns of the first pass",
}
# They run without a cache where gradients are recorded.
NO_CACHE_IN_TRAINING = {"rwkv": "it writes its state in place, which the backward pass would read"}
# Their prompts cannot train.
NO_BACKWARD = {"reformer": "it computes gradients in training mode alone, where dropout is on"}
# They compute no loss of rows with prompts.
NO_LOSS = {"git": "its loss leaves out the columns of an image, which a text alone does not have"}
# Their attentions are refused with an implementation other than the eager one.
ATTENTIONS_BY_EAGER = {
    "falcon": "with sdpa it adds True and False to its scores when asked for attentions",
    "minimax": "with sdpa it puts out those of some layers alone, and does not tell of which",
}
# Their prompts go into the sequence of every row, never into the cache.
NO_PREFIX = {
    "moshi": "it masks other columns than its cache keeps",
    "qwen3_omni_moe_thinker": "its cache looks back at a window, and its attention at everything",
}
# Pads between prompt and text count as distance, whatever the window.
DISTANCE_IN_COLUMNS = {"mpt": "its attention bias counts columns"}


def reason(table: Mapping[str, str], config: Any) -> str | None:
    """What a table says of the model of a configuration, or of its text part; None where it is no exception."""
    found = table.get(config.model_type)
    return found or table.get(getattr(config.get_text_config(decoder=True), "model_type", ""))


def reason_against_soft_prompts(config: Any) -> str | None:
    """Why a model of this configuration takes no soft prompts; None where it does."""
    if "lsh" in getattr(config, "attn_layers", ()):  # Reformer's
        return "what its hashes of a row depend on is the padded width, so padded rows are not exact"
    text = config.get_text_config(decoder=True)
    is_eager = getattr(text, "_attn_implementation", None) == "eager"
    if getattr(text, "use_bidirectional_attention", False) is True and not is_eager:
        return (
            "without a mask it looks at what comes after, and with one it does not; load it with "
            "attn_implementation='eager'"
        )
    return reason(NO_SOFT_PROMPT, config)

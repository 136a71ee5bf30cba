"""All exceptions that the library makes for single types of models, each with its reason.

Each table maps a `config.model_type`, of the whole model or of its text part, to the reason why that type is an
exception. `reason` looks a model up in a table. Some reasons are parts of error texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_ID = "and virtual tokens have no id"
_PER_LAYER = f"it has embeddings per layer, looked up by id, {_NO_ID}"
_ASSISTS = "it reads hidden states and keys of the model it assists"
_HIDES_NO_PADS = "its causal mask hides no pads"
_PADS = "it looks up the ids of images and sounds as those of pads"

# These types take no soft prompts. Most of them read token ids in addition to the embeddings.
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
# These types take no `position_ids`, but their rows may still be padded on the left.
PADDED_ON_THE_LEFT = {"bloom": "its attention bias counts what the mask holds"}
# These types take `position_ids`, but their rows must begin at the first column, so they are padded on the right.
PADDED_ON_THE_RIGHT = {
    "flaubert": _HIDES_NO_PADS,
    "git": "behind a cache it puts the columns of an image in front of the mask, where pads would stand",
    "minimax_m3_vl_text": "its sparse index counts columns",
    "recurrent_gemma": "its convolution and its recurrence read pads",
    "reformer": "it cuts columns into chunks",
    "xlm": _HIDES_NO_PADS,
}
# The positions of these types begin at 1.
POSITIONS_FROM_ONE = {"paligemma": "transformers counts its positions from 1"}
# If no row of a batch has a prompt, these types compute their positions themselves, as the mask may have any form.
OWN_POSITIONS = {"opt": "its positions count what the mask holds"}
# In a batch with prompts, these types still look up the ids of the text themselves; only prompts replace embeddings.
OWN_LOOK_UP = {"gemma4_unified": _PADS, "gemma4_unified_text": _PADS}
# A later pass cannot continue from the cache of these types, so they generate without one.
NO_CONTINUATION = {
    "reformer": "that holds buckets of hashes, not columns",
    "rwkv": "that is a list, and nothing tells which rows it is of",
    "unlimited_ocr": "that counts the columns of the first pass",
}
# These types run without a cache while gradients are recorded.
NO_CACHE_IN_TRAINING = {"rwkv": "it writes its state in place, which the backward pass would read"}
# The prompts of these types cannot be trained.
NO_BACKWARD = {"reformer": "it computes gradients in training mode alone, where dropout is on"}
# These types cannot compute the loss of rows with prompts.
NO_LOSS = {"git": "its loss leaves out the columns of an image, which a text alone does not have"}
# These types return attentions only with the eager implementation of attention.
ATTENTIONS_BY_EAGER = {
    "falcon": "with sdpa it adds True and False to its scores when asked for attentions",
    "minimax": "with sdpa it puts out those of some layers alone, and does not tell of which",
}
# The prompts of these types are always inline, never a prefix.
NO_PREFIX = {
    "dory": "it runs layers several times, and adds layers to the cache for that during a pass",
    "moshi": "it masks other columns than its cache keeps",
    "qwen3_omni_moe_thinker": "its cache looks back at a window, and its attention at everything",
}
# These types count the pads between a prompt and its text as distance, with and without a window.
DISTANCE_IN_COLUMNS = {"mpt": "its attention bias counts columns"}


def reason(table: Mapping[str, str], config: Any) -> str | None:
    """The reason that `table` gives for a model of this configuration, or for its text part; None if it gives none."""
    found = table.get(config.model_type)
    return found or table.get(getattr(config.get_text_config(decoder=True), "model_type", ""))


def reason_against_soft_prompts(config: Any) -> str | None:
    """Why a model of this configuration takes no soft prompts; None if it takes them."""
    if "lsh" in getattr(config, "attn_layers", ()):  # the LSH attention of Reformer
        return "what its hashes of a row depend on is the padded width, so padded rows are not exact"
    text = config.get_text_config(decoder=True)
    is_eager = getattr(text, "_attn_implementation", None) == "eager"
    if getattr(text, "use_bidirectional_attention", False) is True and not is_eager:
        return (
            "without a mask it looks at what comes after, and with one it does not; load it with "
            "attn_implementation='eager'"
        )
    return reason(NO_SOFT_PROMPT, config)

"""Every exception for a type of model, in one place, each with its reason."""

from __future__ import annotations

# They read token ids beside the embeddings, and a virtual token has none; or something else that no prompt has.
CANNOT: dict[str, str] = {
    "blt": "it groups the bytes of the ids into patches, and virtual tokens have no id",
    "cpmant": "it builds its inputs from the ids, and virtual tokens have no id",
    "deepseek_v4": "it routes experts by a hash of the ids, and virtual tokens have no id",
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        "it has embeddings per layer, looked up by id, and virtual tokens have no id",
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "it reads hidden states and keys of the model it assists"
    ),
    "prophetnet": "it reads pads, so padded rows are not exact",
}
# They take positions, and yet a convolution, an index or chunks count columns or read pads on the left.
COUNT_COLUMNS = {"git", "minimax_m3_vl_text", "recurrent_gemma", "reformer"}
CANNOT_CONTINUE = {"reformer": "that holds buckets of hashes, not columns"}
# Their cache is none that a prefix can stand in.
NEVER_A_PREFIX = {"moshi": "masks other columns than its cache keeps"}
# Pads between prompt and text count as distance, whatever the window.
COUNT_DISTANCE_IN_COLUMNS = {"mpt"}

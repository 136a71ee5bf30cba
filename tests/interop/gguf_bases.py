"""A tiny Llama as a GGUF file, made with the writer of the `gguf` package, as llama.cpp's converter names tensors."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from transformers import PreTrainedModel

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?()=>-+*/Ġ"
MERGES = ["f i", "l m", "fi lm", "Ġ a"]


def tokens(size: int) -> list[str]:
    """The names of the tokens: three special ones, letters, what their merges make, and what fills the embedding up."""
    named = ["<unk>", "<s>", "</s>", *LETTERS, *("".join(pair.split()) for pair in MERGES)]
    return [*named, *(f"<filler{number}>" for number in range(size - len(named)))]


def write_llama(
    path: Path, model: PreTrainedModel, kind: Kind = Kind.F32, start: bool | None = False, **fields
) -> Path:
    """Write a tiny Llama; matrices are stored as `kind`, and norms as float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens(config.vocab_size))
    writer.add_token_types([3, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if start is not None:
        writer.add_add_bos_token(start)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:  # llama.cpp turns pairs of neighbours, transformers halves
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = kind if values.ndim == 2 else Kind.F32
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(_name(name), quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    place, end = name.rsplit(".", 1)
    if place in outer:
        return f"{outer[place]}.{end}"
    _, _, number, inner = place.split(".", 3)
    return f"blk.{number}.{NAMES[inner]}.{end}"

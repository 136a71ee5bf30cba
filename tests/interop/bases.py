"""Tiny bases whose states have a direction in common, as those of trained models have, and tokenizers of many kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from lightning_softprompt import SoftPrompts, TaskTemplate, Tokens
from tests.tokenizer import word_tokenizer

VOCABULARY = 61
WORDS = ["a", "film", "the", "good", "bad", "news", "x", "return", "hi", "so", "is", "it", ":", "=>"]
ODD = 'we"ird |> {{x}} %} 情感 é'
_KINDS: dict[str, tuple[type, type]] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "gemma": (GemmaForCausalLM, GemmaConfig),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig),
    "gpt2": (GPT2LMHeadModel, GPT2Config),
    "gptj": (GPTJForCausalLM, GPTJConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}


def leaning_model(kind: str = "llama", tied: bool = True, **options: Any) -> PreTrainedModel:
    """A random model of some type. Embeddings, and so all states, lean to one side."""
    torch.manual_seed(0)
    made, config = _KINDS[kind]
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "tie_word_embeddings": tied}
    common |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": None}
    if kind.startswith("gpt"):
        common |= {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    else:
        common |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        common |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}
    if kind == "gptj":
        common |= {"rotary_dim": 8}
    model = made(config(**common | options)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight += 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    model.generation_config.eos_token_id = None
    return model


def some_prompts(model: PreTrainedModel) -> SoftPrompts:
    """A prompt of words, one of values that no word has, and one of a task whose name could be anything."""
    prompts = SoftPrompts.for_model(model, {"plain": Tokens([5, 6, 7]), "trained": 6, ODD: 2})
    with torch.no_grad():
        trained = prompts["trained"]
        trained.add_(trained.std() * torch.randn(6, 32, generator=torch.Generator().manual_seed(2)))
    prompts.templates["plain"] = TaskTemplate("{text} =>", " {label}", [" good", " bad"])
    return prompts


def save_base(folder: Path, model: PreTrainedModel, tokenizer: Any = None) -> Path:
    """The model and a tokenizer of words as a base lies on a disk."""
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer(WORDS)).save_pretrained(folder)
    return folder


def with_start_token() -> PreTrainedTokenizerFast:
    """A tokenizer of words that begins every text with `<bos>`."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 0)]
    )
    return tokenizer


def _trained_bpe(metaspace: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    inner = Tokenizer(models.BPE(byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=False)
    signs = [f"<0x{byte:02X}>" for byte in range(256)] if metaspace else []
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *signs],
        initial_alphabet=[] if metaspace else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["a film of the news, leading space, x = f(y) return x"] * 9, trainer)
    state = json.loads(inner.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def real_kinds_of_tokenizers() -> dict[str, tuple[Any, Any]]:
    """Small tokenizers made as those of well-known families, each with a config of its family."""
    spaces, space_merges = _trained_bpe(metaspace=True)
    letters, letter_merges = _trained_bpe(metaspace=False)
    bytes_ = Tokenizer(models.BPE(vocab=letters, merges=letter_merges))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    llama_3 = Tokenizer.from_str(bytes_.to_str())
    llama_3.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    size = len(spaces)
    gemma = {"<pad>": size, "<eos>": size + 1, "<bos>": size + 2, **spaces}
    llama_2 = {"vocab": spaces, "merges": space_merges, "add_bos_token": True}
    qwen = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    return {
        "smollm2": (PreTrainedTokenizerFast(tokenizer_object=bytes_, **named), LlamaConfig()),
        "llama 3": (PreTrainedTokenizerFast(tokenizer_object=llama_3, **named), LlamaConfig()),
        "llama 2": (LlamaTokenizer(**llama_2, legacy=False), LlamaConfig()),
        "llama 1": (LlamaTokenizer(**llama_2, legacy=True), LlamaConfig()),
        "gemma": (GemmaTokenizer(vocab=gemma, merges=space_merges, add_bos_token=True), Gemma2Config()),
        "qwen 2": (Qwen2Tokenizer(vocab=letters, merges=letter_merges, **qwen), Qwen2Config()),
    }

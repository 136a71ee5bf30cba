"""Tiny random models and batches, and the oracle: the bare model on one row alone, unpadded, with hard tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 61


def tiny_model(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model whose weights are large enough that a wrong position or mask shows."""
    torch.manual_seed(seed)
    special = dict(bos_token_id=0, eos_token_id=None, pad_token_id=1)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            **special,
        )
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            **special,
        )
        model = GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = None
    return model.eval()


@dataclass
class Row:
    """One row: the hard tokens its task's prompt stands for, and its text."""

    task: int
    prompt: list[int]
    text: list[int]


@dataclass
class Batch:
    """A mixed batch and the rows it was made of; `start[b]` is the first text column of row b."""

    rows: list[Row]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task_ids: Tensor
    start: list[int]


HARD = {"long": [5, 6, 7, 8, 9, 10, 11], "short": [20, 21], "one": [33]}
TASKS = list(HARD)


def random_batch(seed: int, side: str, rows: int = 6, ragged: bool = True) -> Batch:
    """Rows of all tasks and of none, in random order and of random lengths."""
    draw = random.Random(seed)
    tasks = [*range(len(TASKS)), -1, *(draw.randrange(-1, len(TASKS)) for _ in range(rows - 4))]
    draw.shuffle(tasks)
    made = []
    for task in tasks:
        length = draw.randrange(2, 9) if ragged else 6
        text = [draw.randrange(2, VOCABULARY) for _ in range(length)]
        made.append(Row(task, HARD[TASKS[task]] if task >= 0 else [], text))
    width = max(len(row.text) for row in made)
    ids = torch.full((len(made), width), 1)
    mask = torch.zeros(len(made), width, dtype=torch.int64)
    start = []
    for index, row in enumerate(made):
        begin = width - len(row.text) if side == "left" else 0
        start.append(begin)
        ids[index, begin : begin + len(row.text)] = torch.tensor(row.text)
        mask[index, begin : begin + len(row.text)] = 1
    return Batch(made, ids, mask, torch.where(mask == 1, ids, -100), torch.tensor(tasks), start)


def hard_row(model: PreTrainedModel, row: Row) -> Tensor:
    """Logits of the bare model at the row's text, run alone and unpadded as [hard tokens + text]."""
    with torch.no_grad():
        return model(torch.tensor([row.prompt + row.text])).logits[0, len(row.prompt) :]


def hard_greedy(model: PreTrainedModel, row: Row, new: int, **options: object) -> list[list[int]]:
    """New tokens of the bare model on the row alone."""
    ids = torch.tensor([row.prompt + row.text])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
    return out[:, ids.shape[1] :].tolist()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())

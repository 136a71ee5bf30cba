"""What the tests of distillation share: teachers, students and rows on a tiny model, and the divergence by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_softprompt import PromptDistillation, TaskDataModule, TaskTemplate, Tokens
from tests import tiny
from tests.tokenizer import word_tokenizer

TEACHERS = {
    "tone": "Decide whether the text is positive or negative . a good film => good the bad product => bad .",
    "free": "so it is the news of a film and the product ? a strong text .",
}
TEMPLATES = {
    "tone": TaskTemplate("{text} =>", " {label}", labels=[" good", " bad"]),
    "free": TaskTemplate("{text} :", " {label}"),
}
STARTS = {"tone": [14, 22, 9], "free": [11, 5, 19, 7, 8]}
ROWS: list[dict[str, str]] = [
    {"task": "tone", "text": "it is so good", "label": "good"},
    {"task": "free", "text": "the news"},
    {"task": "free", "text": "a tweet of the film", "label": "it is mild and strong"},
    {"task": "tone", "text": "the film and the news of it"},
    {"task": "free", "text": "it"},
    {"task": "tone", "text": "bad", "label": "bad"},
]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(base: Path, path: str, **options: Any) -> TaskDataModule:
    options = {"batch_size": 6, "needs_targets": False, "train": path, "validation": path, **options}
    return TaskDataModule(str(base), options.pop("tasks", TEMPLATES), **options)


def module_of(base: Path, **options: Any) -> PromptDistillation:
    return PromptDistillation(str(base), **{"teachers": TEACHERS, "max_new_tokens": 5, **options})


def starts() -> dict[str, Any]:
    return {task: Tokens(ids) for task, ids in STARTS.items()}


def log_probabilities(model: PreTrainedModel, prompt: Tensor, text: list[int], answer: list[int]) -> Tensor:
    """Of every token at each position of the answer, from one row alone behind the rows of a prompt."""
    embed = model.get_input_embeddings()
    embedded = torch.cat([prompt, embed(torch.tensor(text + answer))])
    logits = model(inputs_embeds=embedded[None]).logits[0]
    first = len(prompt) + len(text) - 1
    return logits[first : first + len(answer)].log_softmax(-1)


def by_hand(model: PreTrainedModel, teacher: Tensor, student: Tensor, of_teacher: list[int], of_student: list[int],
            answer: list[int]) -> Tensor:  # fmt: skip
    """The divergence at each position of the answer, summed token by token."""
    with torch.no_grad():
        wanted = log_probabilities(model, teacher, of_teacher, answer)
    found = log_probabilities(model, student, of_student, answer)
    total = torch.zeros(len(answer), dtype=torch.float64)
    for token in range(wanted.shape[1]):
        total = total + wanted[:, token].exp() * (wanted[:, token] - found[:, token])
    return total


CHATS = (
    "{% for turn in messages %}{{ {'system': 'text', 'user': 'tweet'}[turn.role] }} {{ turn.content }} . {% endfor %}=>"
)


def save_chat_base(folder: Path, words: str) -> Path:
    """A tiny model with 512 positions whose tokenizer knows these words and has a chat template."""
    torch.manual_seed(0)
    given = word_tokenizer([*words.split(), "text", "tweet", ".", "=>"])
    model = tiny.tiny_model()
    config = type(model.config)(**{**model.config.to_dict(), "vocab_size": len(given), "max_position_embeddings": 512})
    bare = type(model)(config)
    bare.generation_config.eos_token_id = None
    bare.save_pretrained(folder)
    given.chat_template = CHATS
    given.save_pretrained(folder)
    return folder

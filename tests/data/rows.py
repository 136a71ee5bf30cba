"""The tasks and rows that the tests of the data share, and short words for what they do with them."""

from __future__ import annotations

import json

from lightning_softprompt import TaskDataModule, TaskTemplate

WORDS = ["a", "b", "c", "d", "e", "good", "bad", "film", "news", "=", "so"]
TASKS = {
    "tone": TaskTemplate("{text} =", " {tone}", labels=[" good", " bad"]),
    "kind": TaskTemplate("so {text} =", " {kind}", labels=[" film", " news"]),
    "free": TaskTemplate("{text}", "{answer}"),
}
TASKS_OF_ONE_COLUMN = {
    "tone": TaskTemplate("{text} =", " {tone}", labels=[" good", " bad"]),
    "free": TaskTemplate("{text}", "{tone}"),
}
ROWS = [
    {"task": "tone", "text": "a b", "tone": "good"},
    {"task": "kind", "text": "c", "kind": "news"},
    {"task": "free", "text": "d e", "answer": "a b c"},
]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def module(tokenizer, **options) -> TaskDataModule:
    return TaskDataModule(tokenizer, TASKS, **{"batch_size": 8, **options})


def ids(tokenizer, words: str) -> list[int]:
    return tokenizer(words)["input_ids"]

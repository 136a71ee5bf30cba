"""The rows of `predict`: as they were read, with answers beside them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Trainer

from lightning_softprompt import CausalLMModule, TaskTemplate
from lightning_softprompt.cli.predictions import PredictionCollector
from lightning_softprompt.data.encoding import Example
from lightning_softprompt.inference.answers import Answers, TextAnswers, Written

TASKS = {
    "tone": TaskTemplate("{text}", " {tone}", labels=[" good", " bad"]),
    "story": TaskTemplate("{text}", "{title}"),
}
READ = [
    {"text": "so", "tone": "good", "id": "007"},
    {"text": "it", "task": "story", "answer": 42, "title": "It"},
    {"text": "a film"},
]
DATA: Any = SimpleNamespace(
    tasks=TASKS,
    examples={"predict": [Example(t, [5], [], row) for t, row in zip(("tone", "story", "tone"), READ, strict=True)]},
)


def collected(*batches: Any, numbers: list[list[int]]) -> list[dict[str, Any]]:
    collector, module = PredictionCollector(), CausalLMModule("none")
    for answers, of_batch in zip(batches, numbers, strict=True):
        module.answers = answers if isinstance(answers, TextAnswers) else None
        collector.write_on_batch_end(Trainer(logger=False), module, [*answers], of_batch, None, 0, 0)
    return collector.rows(DATA)


def test_columns_of_rows_stand_before_what_is_added() -> None:
    label = Written(" bad", [8], "label", {" good": 0.25, " bad": 0.75})
    first = TextAnswers.of(Answers([label, Written(" its end", [7], "length")], {}))
    second = TextAnswers.of(Answers([None], {0: "memory ran out"}))
    rows = collected(first, second, numbers=[[0, 1], [2]])
    assert [list(row) for row in rows] == [
        ["text", "tone", "id", "task", "answer", "output", "probabilities", "gold"],
        ["text", "task", "answer", "title", "output", "gold"],
        ["text", "task", "answer", "error"],
    ]
    assert rows[0] | {"probabilities": None} == {
        **READ[0],
        **{"task": "tone", "answer": "bad", "output": "bad", "probabilities": None, "gold": "good"},
    }
    assert rows[1] == {**READ[1], "task": "story", "output": "its end", "gold": "It"}  # its own answer stays
    assert rows[2]["answer"] is None and rows[2]["error"] == "row 3: memory ran out"


def test_the_answers_of_a_module_of_the_users_own_and_of_some_batches() -> None:
    rows = collected(["x"], numbers=[[2]])
    assert rows == [{"text": "a film", "task": "tone", "answer": "x", "output": "x"}]

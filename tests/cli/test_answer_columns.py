"""What is written of an answer: the same names in every command."""

from __future__ import annotations

import pytest

from lightning_softprompt import Answer, TaskTemplate
from lightning_softprompt.cli.answer_columns import gold_column, label_columns, text_columns
from lightning_softprompt.inference.answers import Answers, TextAnswers, Written

FOUND = {" good": 0.75, " bad": 0.25}
NAMED = {"good": 0.75, "bad": 0.25}
WHERE = ["a.jsonl, line 1", "a.jsonl, line 2", "a.jsonl, line 3"]


def test_a_text_a_label_and_a_failure() -> None:
    written = [Written(" fine ", [7], "stop"), Written(" good", [8], "label", FOUND), None]
    assert text_columns(TextAnswers.of(Answers(written, {2: "it is empty"})), WHERE) == [
        {"output": "fine"},
        {"output": "good", "probabilities": NAMED},
        {"error": "a.jsonl, line 3: it is empty"},
    ]


def test_the_label_of_a_classification() -> None:
    found = Answers([None, Answer(" good", FOUND)], {0: "it is empty"})
    expected = [{"error": "a.jsonl, line 1: it is empty"}, {"label": "good", "probabilities": NAMED}]
    assert label_columns(found, WHERE[:2]) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [({"tone": "good"}, {"gold": "good"}), ({"tone": None}, {}), ({"tone": "mild"}, {}), ({"text": "so"}, {})],
)
def test_what_is_right_where_the_row_says_so(row: dict, expected: dict) -> None:
    assert gold_column(TaskTemplate("{text}", " {tone}", labels=[" good", " bad"]), row) == expected

"""What is guessed of rows: tasks, targets, kinds, and which rows are held out."""

from __future__ import annotations

import pytest

from lightning_softprompt import SoftPromptError
from lightning_softprompt.cli.survey import columns_of, named_by, split, survey


def reviews(count: int = 40) -> list[dict]:
    return [{"id": i, "text": f"film number {i}", "sentiment": ["bad", "good"][i % 2]} for i in range(count)]


def test_labels_are_told_from_free_text() -> None:
    (found,) = survey(reviews(), "film", "task")
    assert (found.name, found.target) == ("film", "sentiment")
    assert found.template.labels == [" bad", " good"]
    assert (found.template.text, found.template.target) == ("{text}\nSentiment:", " {sentiment}")
    rows = [{"story": f"a long story {i}", "headline": f"head {i}"} for i in range(20)]
    (found,) = survey(rows, "news", "task")
    assert found.target == "headline" and found.template.labels is None


@pytest.mark.parametrize(
    "row, target, texts",
    [
        ({"question": "what is it", "context": "some words here", "answer": "x y"}, "answer", "{question}\n{context}"),
        ({"Label": "a", "sentence": "so good"}, "Label", "{sentence}"),
        ({"uid": "a1", "prompt": "hello", "completion": "you"}, "completion", "{prompt}"),
    ],
)
def test_columns_are_known_by_their_names(row: dict, target: str, texts: str) -> None:
    (found,) = survey([row] * 3, "a", "task")
    assert found.target == target and found.template.text.rpartition("\n")[0] == texts


def test_a_column_of_few_values_is_the_target_where_no_name_tells() -> None:
    rows = [{"kind": "xyz"[i % 3], "words": f"some words {i}"} for i in range(12)]
    (found,) = survey(rows, "a", "task")
    assert found.target == "kind" and found.template.labels == [" x", " y", " z"]
    (found,) = survey(rows, "a", "task", target="words")
    assert found.target == "words" and found.template.labels is None


def test_a_column_names_the_tasks_and_rows_without_a_name_are_left_out() -> None:
    rows = [{**row, "task": ["tone", "mood"][i % 4 // 2]} for i, row in enumerate(reviews())]
    rows[0]["task"] = None
    assert [(each.name, len(each.rows)) for each in survey(rows, "film", "task")] == [("tone", 19), ("mood", 20)]
    assert named_by(rows, "task") == "task" and named_by(reviews(), "task") is None
    assert columns_of([{"a": None, "b": 1}, {"a": "x"}]) == {"a": "x", "b": 1}


def test_rows_that_cannot_be_used_are_left_out() -> None:
    rows = [*reviews(), {"id": 1, "text": "", "sentiment": "good"}, {"id": 2, "text": "so good", "sentiment": None}]
    (found,) = survey(rows, "film", "task")
    assert len(found.rows) == 40


@pytest.mark.parametrize(
    "rows, target, message",
    [
        ([{"text": "a b"}], None, "needs a column of texts and one of what to answer; columns: 'text'"),
        ([{"text": "a b", "y": "c"}], "z", "there is no column 'z'; columns: 'text', 'y'"),
        ([{"label": "c"}], None, "has the column 'label' alone"),
        ([{"text": "", "label": "c"}], None, "has no row with all of 'text', 'label'"),
    ],
)
def test_rows_of_which_nothing_can_be_guessed(rows: list[dict], target: str | None, message: str) -> None:
    with pytest.raises(SoftPromptError, match=message):
        survey(rows, "a", "task", target)


def test_a_tenth_of_each_label_is_held_out_and_no_text_stands_on_both_sides() -> None:
    rows = [{**row, "text": f"film number {i // 4}"} for i, row in enumerate(reviews(160))]
    rows += [{"text": f"other {i}", "sentiment": "fine"} for i in range(20)]
    tasks = survey(rows, "film", "task")
    train, held_out = split(tasks, seed=0)
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, rows))
    texts = [{row["text"] for row in part} for part in (train, held_out)]
    assert not texts[0] & texts[1] and 0.08 * len(rows) <= len(held_out) <= 0.12 * len(rows)
    assert {row["sentiment"] for row in held_out} == {"bad", "good", "fine"}
    assert split(tasks, seed=0) == (train, held_out) and split(tasks, seed=1) != (train, held_out)

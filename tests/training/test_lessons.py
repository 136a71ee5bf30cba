"""What teachers say of rows: answers against the bare model on hard tokens, each asked for once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate, Tokens, attach
from lightning_softprompt.base.tokens import encode_target, encode_text
from lightning_softprompt.data.encoding import Example
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from lightning_softprompt.training.lessons import Lessons
from lightning_softprompt.training.teachers import Teacher
from tests import tiny
from tests.training.distilled import STARTS, TEACHERS, TEMPLATES, starts


@pytest.fixture
def tokenizer(tiny_base) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def lessons_of(tokenizer: Any, top_k: int | None = None, templates: dict = TEMPLATES) -> Lessons:
    model = tiny.tiny_model()
    encodings = {task: TaskEncoding.of(tokenizer, task, template) for task, template in templates.items()}
    teachers = {task: Teacher.of(task, TEACHERS[task], encodings[task]) for task in templates}
    attach(model, prompts := SoftPrompts.for_model(model, starts()))
    for teacher in teachers.values():
        prompts.add(teacher.name, Tokens(teacher.ids), model=model, teacher=True)
    return Lessons(model, tokenizer, teachers, encodings, 6, top_k)


def rows_of(tokenizer: Any, task: str, *texts: str) -> list[Example]:
    return [
        Example(task, encode_text(tokenizer, TEMPLATES[task].render_text({"text": text}, "")), []) for text in texts
    ]


def test_missing_answers_are_greedy_and_end_where_the_text_ends(tokenizer) -> None:
    bare = tiny.tiny_model()
    texts = [
        f"{one} {other}" for one in ("a", "the", "it", "so") for other in ("film", "good", "news", "text", "tweet")
    ]
    rows, hard = rows_of(tokenizer, "free", *texts), encode_target(tokenizer, TEACHERS["free"])
    expected = [tiny.hard_greedy(bare, tiny.Row(0, hard, row.text_ids), 6)[0] for row in rows]
    lessons = lessons_of(tokenizer)
    ends = {tokenizer.eos_token_id, expected[0][2]}  # another token may end a text, too, as in models that chat
    lessons._model.generation_config.eos_token_id = expected[0][2]
    found = [row.target_ids for row in lessons.with_answers(rows)]
    assert any(len(answer) < 6 for answer in found) and any(len(answer) == 6 for answer in found)
    for answer, whole in zip(found, expected, strict=True):
        end = next((place for place, token in enumerate(whole) if token in ends), 6)
        assert len(answer) == min(6, end + 1) and answer[:end] == whole[:end]


def test_a_label_is_answered_by_the_teacher_and_by_the_student(tokenizer) -> None:
    bare, words = tiny.tiny_model(), ("a", "the", "it", "so", "film", "good", "news", "text", "tweet", "bad", "is")
    rows = rows_of(tokenizer, "tone", *[f"{one} {other}" for one in words for other in words])
    labels = [encode_target(tokenizer, label)[0] for label in TEMPLATES["tone"].labels or []]
    lessons, of = lessons_of(tokenizer), []
    for hard in (encode_target(tokenizer, TEACHERS["tone"]), STARTS["tone"]):
        scores = [tiny.hard_row(bare, tiny.Row(0, hard, row.text_ids))[-1] for row in rows]
        of.append([[max(labels, key=lambda token: float(score[token]))] for score in scores])
    assert lessons.answers(rows) == of[0] and lessons.answers(rows, by_students=True) == of[1] != of[0]


def test_each_answer_is_written_once_and_own_targets_stay(tokenizer, monkeypatch) -> None:
    lessons, calls = lessons_of(tokenizer), []
    answers = lessons.answers
    monkeypatch.setattr(lessons, "answers", lambda rows: calls.append(len(rows)) or answers(rows))
    rows = rows_of(tokenizer, "free", "a film", "it", "a film")
    own = Example("free", rows[0].text_ids, [7, 9])
    first = lessons.with_answers([*rows, own])
    again = lessons.with_answers([*rows[::-1], own])
    assert calls == [2] and first[0] == first[2] and first[:3] == again[:3][::-1]
    assert first[3] is own and all(row.target_ids for row in first)


def test_what_is_kept_is_of_the_row_and_its_answer(tokenizer) -> None:
    whole, kept = lessons_of(tokenizer), lessons_of(tokenizer, top_k=5)
    rows = [Example("free", [5, 6], [7, 8]), Example("tone", [5, 6], [7, 8]), Example("free", [5, 6], [9])]
    with torch.inference_mode():  # as in a validation, before the step that learns from it
        kept.remembered(rows[:2])
    for order in ([0, 1, 2], [2, 0, 1]):
        given = [rows[place] for place in order]
        expected, found = whole.taught(given).likeliest(5), kept.remembered(given)
        assert torch.equal(found.tokens, expected.tokens) and not found.log_probabilities.is_inference()
        assert tiny.relative_error(found.log_probabilities, expected.log_probabilities) < 1e-5


def test_rows_that_cannot_be_taught_are_named(tokenizer) -> None:
    lessons = lessons_of(tokenizer, templates={"tone": TEMPLATES["tone"]})
    with pytest.raises(SoftPromptError, match="rows of 'free' have no teacher; there are teachers of: 'tone'"):
        lessons.with_answers([Example("free", [5], [])])
    with pytest.raises(SoftPromptError, match=r"a row and its answer have 1\d\d tokens, and the model 128 positions"):
        lessons.taught([Example("tone", [5] * 120, [6])])
    with pytest.raises(SoftPromptError, match=r"'tone \(teacher\)' cannot answer the row"):
        lessons.with_answers([Example("tone", [5] * 120, [])])


def test_an_answer_without_a_text_is_one_that_ends_at_once(tokenizer) -> None:
    lessons = lessons_of(tokenizer, templates={"free": TaskTemplate("{text} :", " {label}")})
    (row,) = rows_of(tokenizer, "free", "a film")
    hard = encode_target(tokenizer, TEACHERS["free"])
    lessons._model.generation_config.eos_token_id = tiny.hard_greedy(
        tiny.tiny_model(), tiny.Row(0, hard, row.text_ids), 1
    )[0][0]
    (answered,) = lessons.with_answers([row])
    assert len(answered.target_ids) == 1 and lessons.taught([answered]).log_probabilities.shape == (1, tiny.VOCABULARY)

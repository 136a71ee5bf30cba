"""How a row becomes text and target, and templates that cannot be used."""

from __future__ import annotations

import pytest

from lightning_softprompt import SoftPromptError, TaskTemplate
from lightning_softprompt.prompts.templates import check_templates, columns_of

REVIEW = TaskTemplate("{title}: {text} {{really}} =", " {tone}", labels=[" good", " bad"])
ROW = {"title": "A {b}", "text": "c", "tone": "good", "stars": 5}


def test_columns_stand_where_their_names_stood() -> None:
    assert REVIEW.render_text(ROW, "here") == "A {b}: c {really} ="
    assert REVIEW.render_target(ROW, "here") == " good"
    assert TaskTemplate("{stars} of 5").render_text(ROW, "here") == "5 of 5"
    assert columns_of(REVIEW.text) == ["title", "text"] and columns_of("no column") == []


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"text": None}, "here: the template '{title}: {text} {{really}} =' needs the column 'text', which is empty"),
        ({"tone": "Good"}, "here: the target is ' Good', the task's labels are ' good', ' bad'"),
        ({"tone": None}, "here: the template ' {tone}' needs the column 'tone', which is empty; columns: 'title', "),
    ],
    ids=str,
)
def test_a_row_that_does_not_fit_is_named(changed: dict, message: str) -> None:
    row = {**ROW, **changed}
    with pytest.raises(SoftPromptError) as caught:
        REVIEW.render_text(row, "here")
        REVIEW.render_target(row, "here")
    assert str(caught.value).startswith(message)
    with pytest.raises(SoftPromptError, match=r"the target ' \{tone\}' is empty"):
        TaskTemplate(target=" {tone}").render_target({"tone": " "}, "here")


@pytest.mark.parametrize(
    "template, message",
    [
        (TaskTemplate("{text}", "{label"), "'{label' has unbalanced braces"),
        (TaskTemplate("{text[0]}"), "may only hold"),
        (TaskTemplate(labels=["a", "b", "a"]), "at least two different texts, got ['a', 'b', 'a']"),
        (TaskTemplate(system="so"), "is no chat; set chat to true"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_by_task(template: TaskTemplate, message: str) -> None:
    with pytest.raises(SoftPromptError) as caught:
        check_templates({"fine": REVIEW, "bad": template})
    assert "task 'bad'" in str(caught.value) and message in str(caught.value)
    check_templates({"fine": REVIEW, "chat": TaskTemplate(chat=True, system="so")})


def test_a_row_has_a_target_where_all_its_columns_say_something() -> None:
    template = TaskTemplate("{text}", "{a} {b}")
    assert template.has_target({"a": 0, "b": "x"}) and TaskTemplate(target="always").has_target({})
    for row in ({}, {"a": "x"}, {"a": "x", "b": None}, {"a": "x", "b": " \n"}):
        assert not template.has_target(row)

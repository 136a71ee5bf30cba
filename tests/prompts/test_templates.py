"""How a row becomes text and target, and templates that cannot be used."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from lightning_softprompt import SoftPromptError, TaskTemplate, json_values
from lightning_softprompt.prompts.templates import check_templates, columns_of

REVIEW = TaskTemplate("{title}: {text} {{really}} =", " {tone}", labels=[" good", " bad"])
ROW = {"title": "A {b}", "text": "c", "tone": "good", "stars": 5}


def test_columns_stand_where_their_names_stood() -> None:
    assert REVIEW.render_text(ROW, "here") == "A {b}: c {really} ="
    assert REVIEW.render_target(ROW, "here") == " good"
    assert TaskTemplate("{stars} of 5").render_text(ROW, "here") == "5 of 5"
    assert columns_of(REVIEW.text) == ["title", "text"] and columns_of("no column") == []


def test_columns_are_called_as_people_call_them() -> None:
    row = {
        "Review Text": "a",
        "2nd opinion": "b",
        "class-name": "c",
        "meta.title": "d",
        " pad ": "e",
        "2024": "f",
        "é/(x)": "g",
    }
    for name, value in row.items():
        template = TaskTemplate(f"{{{name}}} =>", f" {{{name}}}")
        check_templates({"t": template})
        assert template.render_text(row, "here") == f"{value} =>" and template.render_target(row, "here") == f" {value}"
        assert columns_of(template.text) == [name]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("00501", "00501"),
        ("True", "True"),
        (True, "true"),
        (3.5, "3.5"),
        (10**30, "1" + "0" * 30),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        *((json_values.loads(text), text) for text in ("3.10", "1e5", "false", '["a", 1.0, {"b": null}]')),
    ],
    ids=str,
)
def test_a_value_is_written_as_its_file_says_it(value: Any, text: str) -> None:
    assert TaskTemplate("{a}:").render_text({"a": value}, "here") == f"{text}:"
    assert TaskTemplate(target=" {a}").has_target({"a": value})


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"text": None}, "here: the template '{title}: {text} {{really}} =' needs the column 'text', which is empty"),
        ({"text": b"caf\xe9"}, "here: the column 'text' holds bytes that are no text in UTF-8; write it as text"),
        ({"tone": "Good"}, "here: the target is ' Good', the task's labels are ' good', ' bad'"),
        (
            {"tone": "bad "},
            "here: the target is ' bad ', the task's labels are ' good', ' bad'; ' bad' differs by space alone: write "
            "' bad ' in labels, or change the target",
        ),
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
    for empty in ("", " \n"):
        with pytest.raises(SoftPromptError, match=r"here: the text '.*' is empty; every row needs one"):
            REVIEW.render_text({"title": empty, "text": empty}, "here")
        assert REVIEW.render_text({"title": empty, "text": "c"}, "here") == f"{empty}: c {{really}} ="
    assert TaskTemplate("always").render_text({}, "here") == "always"


@pytest.mark.parametrize(
    "template, message",
    [
        (TaskTemplate("{text}", "{label"), "'{label' has unbalanced braces"),
        (
            TaskTemplate("{text[0]}"),
            "the template '{text[0]}' may only hold {column} fields, as {text}, found {text[0]}; ",
        ),
        (TaskTemplate("so {}"), "the template 'so {}' may only hold {column} fields, as {text}, found {}; "),
        (
            TaskTemplate(target=" {price:.2f}"),
            "the template ' {price:.2f}' may only hold {column} fields, as {text}, found",
        ),
        (TaskTemplate("{a b!r}"), "found {a b!r}; a value is written as it stands in the file"),
        (TaskTemplate('{"json": {text}}'), "for braces themselves write {{ and }}"),
        (TaskTemplate("{0.__class__}"), "may only hold"),
        (TaskTemplate(special_tokens="yes"), "'special_tokens' of the template must be true or false, got 'yes'"),
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


def test_a_value_that_is_nested_too_deep_is_named_by_its_row_and_column() -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(SoftPromptError, match="row 1: the column 'text' is nested too deep; make it flat"):
        TaskTemplate().render_text({"text": deep}, "row 1")

"""What is read from a call's lists: requests that can be served, and why the others cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate, Tokens, attach
from lightning_softprompt.inference.requests import RequestReader, attached_prompts
from tests import tiny
from tests.inference.tasks import LABELS, ROWS, generator
from tests.tokenizer import word_tokenizer

TOKENIZER = word_tokenizer([f"w{index}" for index in range(4, tiny.VOCABULARY)])
LONGEST = 128 - len(tiny.HARD["long"])  # what the models of these tests have room for behind the task "long"


@pytest.fixture
def reader() -> RequestReader:
    model = tiny.tiny_model()
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()})
    return RequestReader(model, TOKENIZER, prompts)


def test_a_request_is_as_long_as_its_prompt_its_text_and_what_may_come_behind(reader: RequestReader) -> None:
    generated = reader.to_generate(3, "w5 w6", "long", 4)
    assert (generated.index, generated.ids, generated.task) == (3, [5, 6], "long")
    assert (generated.length, generated.rows, generated.labels) == (7 + 2 + 4, 1, ())
    assert reader.to_generate(0, [5, 6], None, 4).length == 2 + 4
    ranked = reader.to_rank(1, "w5 w6", "short", ["w7", "w8 w9 w10"])
    assert (ranked.length, ranked.labels) == (2 + 2 + 3, ([7], [8, 9, 10]))
    assert reader.to_rank(1, "w5 w6", "short", [[7], [8, 9, 10]]) == ranked
    assert reader.to_rank(1, [*np.array([5, 6])], "short", [[7], [*np.array([8, 9, 10])]]) == ranked


@pytest.mark.parametrize(
    ("labels", "rows"), [(["w7", "w8", "w9"], 1), (["w7 w8", "w7 w9", "w7"], 1), (["w7 w8", "w8 w8", "w9"], 2)]
)
def test_labels_take_a_row_for_each_way_to_their_last_token(reader: RequestReader, labels, rows: int) -> None:
    assert reader.to_rank(0, "w5", None, labels).rows == rows


BAD: list[tuple[Any, Any, Any, str]] = [
    ("w5", "tone", ["w5"], "unknown task 'tone'; known tasks: 'long', 'short', 'one'"),
    (None, "one", ["w5"], "the text must be a string or a list of token ids, found None"),
    ("", "one", ["w5"], "the text has no tokens; give it some words"),
    ([], "one", ["w5"], "the text has no tokens; give it some words"),
    ("w5 \ud800", "one", ["w5"], r"the tokenizer cannot read 'w5 \ud800'"),
    (["w5"], "one", ["w5"], "the text is a list, and token ids are whole numbers, found ['w5']"),
    ("w5", "one", [["w5"]], "labels[0] is a list, and token ids are whole numbers, found ['w5']"),
    ([5, 61], "one", ["w5"], "the text has token 61, the model's embedding knows 0 to 60; take the model's own"),
    ([5, -1], "one", ["w5"], "the text has token -1, the model's embedding knows 0 to 60"),
    ("w5", "one", [], "expected a list of one label or more, found []"),
    ("w5", "one", "w5", "expected a list of one label or more, found 'w5'"),
    ("w5", "one", ["w5", 3], "labels[1] must be a string or a list of token ids, found 3"),
    ("w5", "one", ["w5", ""], "labels[1] has no tokens; give it some words"),
    ("w5", "one", [[], "w5"], "labels[0] has no tokens; give it some words"),
    ("w5", "one", ["w5", [5, 99]], "labels[1] has token 99, the model's embedding knows 0 to 60"),
    (
        [5] * (LONGEST - 1),
        "long",
        ["w5", "w5 w6"],
        f"7 tokens of prompt, {LONGEST - 1} of text and 2 of the longest label are more than the model's 128 positions"
        "; shorten the text, or rank fewer or shorter labels",
    ),
]


@pytest.mark.parametrize(("text", "task", "labels", "reason"), BAD)
def test_what_cannot_be_ranked_says_why(reader: RequestReader, text, task, labels, reason: str) -> None:
    with pytest.raises(SoftPromptError) as caught:
        reader.to_rank(0, text, task, labels)
    assert reason in str(caught.value)
    if labels == ["w5"]:
        with pytest.raises(SoftPromptError) as caught:
            reader.to_generate(0, text, task, 1)
        assert reason in str(caught.value)


def test_positions_are_used_up_and_not_passed(reader: RequestReader) -> None:
    assert reader.to_generate(0, [5] * (LONGEST - 3), "long", 3).length == 128
    with pytest.raises(SoftPromptError, match="and max_new_tokens=4 are more than the model's 128 positions; shorten"):
        reader.to_generate(0, [5] * (LONGEST - 3), "long", 4)
    assert reader.to_rank(0, [5] * (LONGEST - 2), "long", ["w5 w6"]).length == 128


def test_rows_become_what_their_templates_say() -> None:
    answering = generator()
    reader = RequestReader(answering.model, answering.tokenizer, answering.prompts, answering.prompts.templates)
    answering.prompts.templates.clear()  # a call is not changed while it runs
    for index, (row, task, ids) in enumerate(ROWS):
        request = reader.to_answer(index, row, task, 5)
        labels = LABELS.get(str(task), [])
        assert (request.index, request.ids, request.task) == (index, ids, task)
        assert [*request.labels] == labels and request.rows == (3 if task == "long" else 1)
        prompt = len(answering.prompts[task]) if task else 0
        assert request.length == prompt + len(ids) + (max(map(len, labels)) if labels else 5)
    assert reader.template("long") is reader.encoding("long").template  # type: ignore[union-attr]
    assert reader.template("raw") is reader.encoding("raw") is reader.template(None) is None


@pytest.mark.parametrize(
    ("text", "label", "mend"),
    [
        ([5] * 200, "w5", "; shorten the text"),
        ([5], " ".join(["w5"] * 200), "; give the task shorter labels, or shorten the text"),
    ],
)
def test_what_is_too_long_is_to_be_shortened(text: list[int], label: str, mend: str) -> None:
    answering = generator()
    template = TaskTemplate("{text}", " {label}", labels=["w6", label])
    reader = RequestReader(answering.model, answering.tokenizer, answering.prompts, {"long": template})
    with pytest.raises(SoftPromptError) as caught:
        reader.to_answer(0, text, "long", 5)
    assert str(caught.value).endswith(f"positions{mend}")


def test_a_task_is_a_name(reader: RequestReader) -> None:
    for task in (3, ["one"], ("one",)):
        with pytest.raises(SoftPromptError, match="the task must be a name, or None for no prompt, found"):
            reader.to_generate(0, "w5", task, 1)  # type: ignore[arg-type]


def test_prompts_are_those_that_are_attached() -> None:
    model = tiny.tiny_model()
    with pytest.raises(SoftPromptError, match="the model has no prompts; attach"):
        attached_prompts(model)
    prompts = SoftPrompts.for_model(model, {"one": Tokens([5])})
    assert attached_prompts(attach(model, prompts)) is prompts

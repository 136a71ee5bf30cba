"""Rows of what clients ask: templates, seeds, lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.serving.requests import ChatRequest, CompletionRequest
from lightning_softprompt.serving.row_making import RowMaker
from lightning_softprompt.serving.rows import LabelRow, Part, Row, TextRow
from lightning_softprompt.serving.tasks import ServedTasks, TaskFolder
from tests import tiny
from tests.inference.tasks import HARD, LABELS, ROWS, TEMPLATES, words
from tests.serving.helpers import save

MAKER = RowMaker(words(), frozenset([2]), most_tokens=100, most_rows=8, max_new_tokens=30)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> ServedTasks:
    folder: Path = tmp_path_factory.mktemp("prompts")
    save(folder, HARD, TEMPLATES)
    return TaskFolder(tiny.tiny_model(), words(), folder, "base").current


def rows(tasks: ServedTasks, maker: RowMaker = MAKER, deliver: Any = print, **asked: Any) -> list[Row]:
    return maker.rows(CompletionRequest(**{"model": "raw", "prompt": "w6", **asked}), tasks, deliver)


@pytest.mark.parametrize(("given", "task", "ids"), ROWS)
def test_a_row_goes_through_the_template_of_its_task(given: Any, task: str | None, ids: list[int], tasks) -> None:
    (row,) = rows(tasks, model=task or "base", prompt=given)
    assert row.request.ids == ids and row.request.task == task and row.prompts is tasks.prompts
    assert row.prompt_tokens == len(ids) + (len(HARD[task]) if task else 0)
    assert isinstance(row, LabelRow if task in LABELS else TextRow)
    if isinstance(row, LabelRow):
        assert row.labels == [label.strip() for label in TEMPLATES[str(task)].labels or []]


def test_n_rows_of_each_input_and_each_tells_its_own_index(tasks) -> None:
    told: list[tuple[int, Part]] = []
    made = rows(tasks, deliver=lambda *each: told.append(each), prompt=["w6", "w7 w8"], n=3)
    assert [row.request.ids for row in made] == [[6]] * 3 + [[7, 8]] * 3
    for row in made[::-1]:
        row.fail("x")
    assert [index for index, _ in told] == [5, 4, 3, 2, 1, 0]


def test_a_seed_belongs_to_the_number_of_the_answer_and_not_to_its_place(tasks) -> None:
    def seeds(**asked: Any) -> list[str]:
        return [row.sampler.seed for row in rows(tasks, **asked) if isinstance(row, TextRow)]

    assert seeds(seed=7, n=2, prompt=["w6", "w7"]) == ["7:0", "7:1"] * 2 == seeds(seed=7, n=2) * 2
    assert seeds(seed=7) != seeds(seed=8) and seeds() != seeds()


def test_options_reach_the_row(tasks) -> None:
    (row,) = rows(tasks, temperature=0.5, top_p=0.4, max_tokens=5, min_tokens=2, logprobs=3, stream=True, stop="w9")
    assert isinstance(row, TextRow) and row.max_tokens == 5 and row.streams
    sampler = row.sampler
    assert (sampler.temperature, sampler.top_p, sampler.logprobs, sampler.min_tokens) == (0.5, 0.4, 3, 2)
    assert sampler.end_tokens == {2} and row.request.length == 3 + 1 + 5
    (row,) = rows(tasks)
    assert isinstance(row, TextRow) and (row.sampler.temperature, row.sampler.top_p) == (1.0, 1.0)
    (row,) = rows(tasks, temperature=1e-9)
    assert isinstance(row, TextRow) and row.sampler.temperature == 0


def test_an_answer_is_as_long_as_there_is_room_where_the_client_leaves_that_open(tasks) -> None:
    (row,) = rows(tasks)
    assert isinstance(row, TextRow) and (row.max_tokens, row.request.length) == (30, 34)
    (row,) = rows(tasks, prompt=[6] * 90)
    assert isinstance(row, TextRow) and (row.max_tokens, row.request.length) == (7, 100)


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"prompt": [6] * 99}, "take 103 tokens, and this server takes 100; shorten the text$"),
        ({"max_tokens": 98}, "take 102 tokens, and this server takes 100"),
        ({"max_tokens": 10**9}, "more than the model's 128 positions; shorten"),
        ({"prompt": ""}, "the text has no tokens"),
        ({"prompt": [10**6]}, "the text has token 1000000, the model's embedding knows 0 to 60"),
        ({"prompt": "\ud800"}, "the tokenizer cannot read"),
        ({"model": "short"}, "a text alone fills a template of one column, and .* has 2"),
        ({"model": "short", "prompt": {"first": "w6"}}, "needs the column 'second', which is missing"),
        ({"prompt": {"text": "w6"}}, "the task 'raw' has no template to put them into"),
        ({"n": 5, "prompt": ["w6", "w7"]}, "this asks for 10 answers at once, and the server takes 8"),
    ],
)
def test_what_cannot_be_answered_is_said(asked: dict[str, Any], said: str, tasks) -> None:
    with pytest.raises(SoftPromptError, match=said):
        rows(tasks, **asked)


def test_a_row_may_be_as_long_as_the_server_takes(tasks) -> None:
    (row,) = rows(tasks, replace(MAKER, most_tokens=5), max_tokens=1)
    assert row.request.length == 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_tokens": 500}, "and max_tokens=500 are more than the model's 128 positions; shorten"),
        ({"prompt": [6] * 200}, "and 1 of the answer are more than the model's 128 positions; shorten the text"),
        ({"prompt": " ", "model": "long"}, "the prompt is empty; give it some words"),
        ({"prompt": ["w6", ""], "model": "long"}, "the prompt is empty; give it some words"),
    ],
)
def test_an_error_speaks_of_what_the_client_sent(asked: dict[str, Any], said: str, tasks) -> None:
    with pytest.raises(SoftPromptError) as caught:
        rows(tasks, **asked)
    assert said in str(caught.value) and "max_new_tokens" not in str(caught.value)


def test_an_error_speaks_of_the_argument_of_chats(tasks) -> None:
    message = {"role": "user", "content": "w6"}
    for options in ({"max_tokens": 500}, {"max_completion_tokens": 500}):
        with pytest.raises(SoftPromptError, match=f"{next(iter(options))}=500"):
            MAKER.rows(ChatRequest(model="raw", messages=[message], **options), tasks, print)
    with pytest.raises(SoftPromptError, match="the message is empty; give it some words"):
        MAKER.rows(ChatRequest(model="long", messages=[{**message, "content": ""}]), tasks, print)

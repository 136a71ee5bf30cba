"""Rows that cannot be answered beside those that can, streams that end early, and mistakes of the call."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

from lightning_softprompt import MixedTaskGenerator, SoftPromptError, TaskTemplate
from lightning_softprompt.inference.task_answers import TaskAnswers
from tests import tiny
from tests.inference.tasks import LABELS, ROWS, expected, forward_passes, generator, split, words

NEW = 6
BAD: list[tuple[Any, Any, str]] = [
    (None, "long", "the row must be a text or a dict of columns, found None"),
    (3.5, "short", "the row must be a text or a dict of columns, found 3.5"),
    ("w5", "short", "a text alone fills a template of one column, and '{first} w7 {second}' has 2; give a dict"),
    (
        {"first": "w5"},
        "short",
        "the row: the template '{first} w7 {second}' needs the column 'second', which is missing",
    ),
    ({"text": None}, "long", "the row: the template 'w5 {text} w6' needs the column 'text', which is empty"),
    ({"text": "w5"}, "raw", "the row has columns, and the task 'raw' has no template to put them into"),
    ({"text": "w5"}, None, "the row has columns, and the task None has no template to put them into"),
    ("w5", "tone", "unknown task 'tone'; known tasks: 'long', 'short', 'one', 'raw'"),
    ("w5", ["long"], "the task must be a name, or None for no prompt, found ['long']"),
    ("w5 " * 120, "long", "7 tokens of prompt, 122 of text and 4 of the longest label are more than the model's 128"),
    (
        "w5 " * 120,
        "raw",
        "3 tokens of prompt, 120 of text and max_new_tokens=6 are more than the model's 128 positions",
    ),
    ({"text": "\ud800"}, "long", "the row: the tokenizer cannot read"),
    ({"first": "", "second": object()}, "short", "cannot be put into the template"),
    (["w5"], "long", "the text is a list, and token ids are whole numbers, found ['w5']"),
    ("", "raw", "the text has no tokens; give it some words"),
]


class Spoilt:
    """A value that cannot be written."""

    def __format__(self, how: str) -> str:
        raise RuntimeError("spoilt")


def test_a_bad_row_stops_and_alters_no_other_one(caplog) -> None:
    rows: list[Any] = [*ROWS]
    for index, (row, task, _) in enumerate(BAD):
        row = {"first": "w5", "second": Spoilt()} if "cannot be put" in BAD[index][2] else row
        rows.insert(1 + 2 * index if 1 + 2 * index < len(rows) else len(rows), (row, task, None))
    good = [index for index, row in enumerate(rows) if row[2] is not None]
    answering = generator()
    found = answering.answer(**split(rows), max_new_tokens=NEW)
    assert [found[index] for index in good] == [text for text, _, _ in expected(new=NEW)]
    bad = [index for index in range(len(rows)) if index not in good]
    assert list(found.failures) == bad == list(answering.failures)
    for index, (_, _, reason) in zip(bad, BAD, strict=True):
        assert reason in found.failures[index]
        assert found[index] is found.token_ids[index] is found.finish_reasons[index] is None
    assert len(caplog.records) == 1 and f"{len(BAD)} of {len(rows)} requests have no answer" in caplog.text
    stream = answering.stream(**split(rows), max_new_tokens=NEW)
    last = dict(stream)
    assert [last.get(index) for index in range(len(rows))] == found and stream.failures == found.failures
    assert len(caplog.records) == 2


def test_a_row_whose_logits_are_not_finite_has_no_label() -> None:
    answering = generator()
    expected = answering.answer(["w30", "w31"], ["long", "one"])
    with torch.no_grad():
        answering.model.get_input_embeddings().weight[47] = float("nan")
    rows: dict[str, Any] = {"rows": ["w30", "w47", "w31"], "tasks": ["long", "long", "one"]}
    reason = {1: "the model's logits of this row are not finite; load the base in bfloat16 or float32"}
    for found in (answering.answer(**rows), answering.classify(**rows), stream := answering.stream(**rows)):
        texts = dict(found) if found is stream else dict(enumerate(found))
        texts = {index: getattr(each, "label", each) for index, each in texts.items() if each is not None}
        assert {index: text.strip() for index, text in texts.items()} == {0: expected[0], 2: expected[1]}
        assert found.failures == reason
    ranked = answering.rank(["w30", "w47"], ["long", "long"], [["w10", "w12"]] * 2)
    assert ranked[0] is not None and ranked[1] is None and ranked.failures == reason


def test_a_template_that_cannot_be_used_fails_the_rows_of_its_task_alone() -> None:
    answering = generator()
    answering.prompts.templates["one"] = TaskTemplate("{text", " {label}")
    answering.prompts.templates["raw"] = TaskTemplate("{text}", " {label}", labels=[" w10", "  w10"])
    found = answering.answer(["w5", "w6", "w30 w31"], ["one", "raw", "long"])
    assert "unbalanced braces" in found.failures[0] and "same tokens of the labels" in found.failures[1]
    assert found[2] == expected()[0][0]
    assert list(answering.classify(["w6", "w30 w31"], ["raw", "long"]).failures) == [0]


def test_labels_beyond_the_embedding_fail_their_rows() -> None:
    answering = generator()
    answering.tokenizer.add_tokens(["w61"])
    answering.prompts.templates["raw"] = TaskTemplate("{text}", " {label}", labels=[" w10", " w61"])
    found = answering.classify(["w6", "w30 w31"], ["raw", "long"])
    assert "the label ' w61' of the task 'raw' has token 61, the model's embedding knows 0 to 60" in found.failures[0]
    assert found[1] is not None


def test_ids_are_a_text_that_went_through_the_template() -> None:
    rows: list[Any] = [(ids, task) for _, task, ids in ROWS]
    assert generator().answer(**split(rows), max_new_tokens=NEW) == [text for text, _, _ in expected(new=NEW)]


def test_a_template_that_is_set_later_is_used() -> None:
    answering = generator()
    raw = answering.answer(["w36 w37 w38"], ["raw"], max_new_tokens=NEW)
    answering.prompts.templates["raw"] = TaskTemplate("w36 {text} w38", "{label}")
    assert answering.answer(["w37"], ["raw"], max_new_tokens=NEW) == raw


@pytest.mark.parametrize("is_dropped", [False, True])
def test_a_stream_that_is_left_stops_the_work_and_leaves_nothing(is_dropped: bool) -> None:
    answering, before = generator(), threading.active_count()
    shapes = forward_passes(answering.model)
    rows = [row for row in ROWS if row[1] not in LABELS] * 3
    stream = answering.stream(**split(rows), max_new_tokens=60, max_batch_tokens=300)
    assert not shapes and threading.active_count() == before
    for _ in range(5):
        next(stream)
    if is_dropped:
        del stream
        gc.collect()
    else:
        stream.close()
        assert list(stream) == []
    assert threading.active_count() == before and 1 <= len(shapes) < 10
    assert answering.answer(**split(), max_new_tokens=NEW) == [text for text, _, _ in expected(new=NEW)]


def test_without_memory_batches_of_answers_and_streams_are_halved(caplog) -> None:
    answering, refused = generator(), []

    def short_of_memory(model: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 3:
            refused.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    answering.model.register_forward_pre_hook(short_of_memory, with_kwargs=True, prepend=True)
    right = [text for text, _, _ in expected(new=NEW)]
    stream = dict(answering.stream(**split(), max_new_tokens=NEW))
    assert refused and [stream[index] for index in range(len(right))] == right
    found = answering.answer(**split(), max_new_tokens=NEW)
    assert found == right and found.failures == {} and "out of memory; going on with" in caplog.text


def test_mistakes_of_the_call_are_raised() -> None:
    answering = generator()
    calls: list[Any] = [answering.answer, answering.classify, answering.stream]
    for call in calls:
        for rows, tasks in ((["w5", "w5"], ["long"]), ("w5", ["long", "long"]), (["w5"], "long")):
            with pytest.raises(SoftPromptError, match="rows and tasks must be lists of equal length"):
                call(rows, tasks)
        with pytest.raises(SoftPromptError, match="max_batch_tokens must be at least 1, got 0"):
            call(["w5"], ["long"], max_batch_tokens=0)
        assert list(call([], [])) == []
    with pytest.raises(SoftPromptError, match="the answers of the task 'short' are free text; call answer"):
        answering.classify(["w5", "w5"], ["long", "short"])
    for task in ("raw", None):
        with pytest.raises(SoftPromptError, match=f"the task {task!r} has no template that says them; set prompts"):
            answering.classify(["w5", "w5"], ["long", task])
    with pytest.raises(SoftPromptError, match="stream has a streamer of its own"):
        answering.stream(["w5"], ["long"], streamer=object())
    with pytest.raises(ValueError, match="typos"):
        answering.answer(["w5"], ["raw"], max_length_of_text=2)
    with pytest.raises(ValueError, match="typos"):
        list(answering.stream(["w5"], ["raw"], max_length_of_text=2))
    with pytest.raises(SoftPromptError, match="the model has no prompts; attach"):
        TaskAnswers(tiny.tiny_model(), words(), {})
    with pytest.raises(SoftPromptError, match="the model has no prompts; attach"):
        MixedTaskGenerator(tiny.tiny_model(), words())

"""`MixedTaskGenerator`: rows of many tasks in one call are answered as each is alone, by its task's template."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lightning_softprompt import Answer, MixedTaskGenerator, SoftPrompts, Tokens
from lightning_softprompt.base.tokens import encode_text
from tests import tiny
from tests.inference.tasks import LABELS, ROWS, TEMPLATES, expected, forward_passes, generator, probabilities, split

NEW = 6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_each_row_is_answered_as_it_is_alone(kind: str, budget: int) -> None:
    answering = generator(kind)
    found = answering.answer(**split(), max_new_tokens=NEW, max_batch_tokens=budget)
    assert list(zip(found, found.token_ids, found.finish_reasons, strict=True)) == expected(kind, NEW)
    assert found.failures == {} == answering.failures
    assert {type(text) for text in found} == {str}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_probabilities_are_those_over_the_trie_of_the_labels(kind: str, budget: int) -> None:
    rows = [row for row in ROWS if row[1] in LABELS]
    found = generator(kind).classify(**split(rows), max_batch_tokens=budget)
    for answer, (_, task, text) in zip(found, rows, strict=True):
        right = probabilities(kind, str(task), text)
        assert isinstance(answer, Answer) and list(answer.probabilities) == TEMPLATES[str(task)].labels
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-12)
        shares = [torch.tensor([*each.values()], dtype=torch.float64) for each in (answer.probabilities, right)]
        assert tiny.relative_error(*shares) < 1e-5
        assert answer.label == max(right, key=right.__getitem__)


def test_a_label_that_begins_with_another_one_can_win() -> None:
    rows = [(f"w{first} w{second}", "long") for first in range(20, 30) for second in range(30, 40)]
    found = {answer.label for answer in generator().classify(**split(rows)) if answer is not None}
    assert {" w10", " w10 w11"} <= found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_stream_ends_in_the_answers_and_grows_towards_them(kind: str) -> None:
    said: dict[int, list[str]] = {}
    for index, text in generator(kind).stream(**split(), max_new_tokens=NEW, max_batch_tokens=60):
        said.setdefault(index, []).append(text)
    for index, (text, ids, reason) in enumerate(expected(kind, NEW)):
        assert said[index][-1] == text
        assert len(said[index]) == (1 if reason == "label" else max(1, len(ids)))
        for shorter, longer in zip(said[index], said[index][1:], strict=False):
            assert longer.startswith(shorter) and len(longer) > len(shorter)


def test_labels_and_free_text_share_no_batch_and_labels_of_a_batch_share_a_pass() -> None:
    answering = generator()
    shapes = forward_passes(answering.model)
    answering.answer(**split([row for row in ROWS if row[1] in LABELS]))
    assert len(shapes) == 1
    shapes.clear()
    answering.answer(**split(), max_new_tokens=NEW)
    assert len(shapes) == 1 + NEW


def test_threads_answer_classify_and_stream_with_one_generator() -> None:
    answering, turns = generator(), threading.Barrier(6)
    texts = [text for text, _, _ in expected(new=NEW)]
    labelled = [row for row in ROWS if row[1] in LABELS]
    labels = [answer.label for answer in answering.classify(**split(labelled)) if answer is not None]

    def with_a_bad_row(rows: list[Any], bad: int) -> dict[str, Any]:
        return split([*rows[:bad], (None, "long"), *rows[bad:]])

    def ask(number: int) -> None:
        bad = number % 5
        turns.wait(60)
        for _ in range(4):
            if number < 2:
                found: Any = answering.answer(**with_a_bad_row(ROWS, bad), max_new_tokens=NEW)
                right: list[Any] = [*texts]
                assert list(answering.failures) == [bad]
            elif number < 4:
                found = answering.classify(**with_a_bad_row(labelled, bad))
                right = [*labels]
                assert list(answering.failures) == [bad]
                found[:] = [answer and answer.label for answer in found]
            else:
                stream = answering.stream(**with_a_bad_row(ROWS, bad), max_new_tokens=NEW)
                last = dict(stream)
                found = [last.get(index) for index in range(len(ROWS) + 1)]
                right = [*texts]
                assert list(stream.failures) == [bad]
            right.insert(bad, None)
            assert list(found) == right

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    assert set(vars(answering)) == set(vars(generator()))


def test_generate_says_once_that_a_template_is_not_used(caplog) -> None:
    answering = generator()
    for _ in range(2):
        answering.generate(["w5", "w6", "w7", "w8"], ["long", "long", "raw", None], max_new_tokens=1)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("lightning_softprompt", logging.WARNING)
    assert record.message.startswith(
        "the task 'long' has a template, and generate takes texts as they are; call answer"
    )
    answering.generate(["w5"], ["one"], max_new_tokens=1)
    generator().generate(["w5"], ["long"], max_new_tokens=1)
    assert len(caplog.records) == 3
    answering.answer(**split(), max_new_tokens=1)
    answering.classify(["w5"], ["long"])
    answering.rank(["w5"], ["long"], [["w6"]])
    assert len(caplog.records) == 3


def test_generate_takes_texts_as_they_are() -> None:
    found = generator().generate(["w30 w31", "w35"], ["long", "one"], max_new_tokens=NEW)
    rows = [tiny.Row(0, tiny.HARD["long"], [30, 31]), tiny.Row(0, tiny.HARD["one"], [35])]
    tokenizer = generator().tokenizer
    for answer, row in zip(found, rows, strict=True):
        (ids,) = tiny.hard_greedy(tiny.tiny_model(), row, NEW, do_sample=False, eos_token_id=2, pad_token_id=1)
        assert answer == tokenizer.decode(ids, skip_special_tokens=True)


def test_progress_of_answers_goes_by_rows(capsys) -> None:
    generator().answer(**split(), max_new_tokens=1, show_progress=True)
    printed = capsys.readouterr()
    assert "answering" in printed.err and "9/9" in printed.err and printed.out == ""
    generator().classify(["w5", None], ["long", "long"], show_progress=True)  # type: ignore[list-item]
    assert "classifying" in (said := capsys.readouterr().err) and "2/2" in said


def test_a_generator_loads_what_was_saved(tiny_base, tmp_path) -> None:
    bare, tokenizer = tiny.tiny_model("llama"), AutoTokenizer.from_pretrained(tiny_base)
    SoftPrompts.for_model(bare, {"tone": Tokens([42, 43, 44, 45]), "kind": Tokens([46])}).save_pretrained(tmp_path)
    loaded = MixedTaskGenerator.from_pretrained(tiny_base, tmp_path, dtype=torch.float32)
    (answer,) = loaded.generate(["the film"], ["tone"], max_new_tokens=6)
    row = tiny.Row(0, [42, 43, 44, 45], encode_text(tokenizer, "the film"))
    (expected_ids,) = tiny.hard_greedy(bare, row, 6, do_sample=False, eos_token_id=2, pad_token_id=1)
    assert answer == tokenizer.decode(expected_ids, skip_special_tokens=True)

"""The engine: rows as they come, what fails alone, states of the prompts, and its end."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from lightning_softprompt import MixedTaskGenerator, attach
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.requests import RequestReader
from lightning_softprompt.serving.admission import Limits
from lightning_softprompt.serving.engine import STOPPED, Engine
from lightning_softprompt.serving.rows import LabelRow, Part
from tests import tiny
from tests.conformance import models
from tests.inference import tasks as labelled
from tests.inference.tasks import words
from tests.serving.helpers import RAGGED, Asked, RowMaking, alone, prompts_of, texts, wait


class Made:
    """An engine of the tiny model that runs, and how its rows are made."""

    def __init__(self, **limits: int) -> None:
        self.model = tiny.tiny_model()
        self.make = RowMaking(self.model, prompts_of(RAGGED, self.model))
        self.engine = Engine(self.model, words(), Limits(**limits))

    def __enter__(self) -> Made:
        self.engine.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.engine.stop()
        self.engine.join(10)
        assert not self.engine.is_alive

    def answered(self, *rows: Asked) -> list[Part]:
        assert self.engine.submit([one.row for one in rows])
        wait(lambda: all(one.row.has_ended for one in rows))
        return [one.parts[-1] for one in rows]


def expected(task: str | None, text: list[int], new: int, hard: dict[str, list[int]] = RAGGED) -> str:
    ids, _ = alone(tiny.tiny_model(), hard[task] if task else [], text, new)
    return str(words().decode(ids, skip_special_tokens=True))


def test_rows_from_many_threads_are_what_they_are_alone() -> None:
    asked = [(task, text, 2 + index % 5) for index, (task, text) in enumerate(texts(45))]
    with Made(max_batch_tokens=300, max_queue=50) as made:
        rows = [made.make(text, task, new) for task, text, new in asked]
        threads = [threading.Thread(target=made.engine.submit, args=([one.row],)) for one in rows]
        for thread in threads:
            thread.start()
        wait(lambda: all(one.row.has_ended for one in rows))
        assert made.engine.running == made.engine.waiting == 0
        assert made.engine.steps < sum(new for *_, new in asked)
    for one, (task, text, new) in zip(rows, asked, strict=True):
        assert one.parts[0].text == expected(task, text, new)


def test_a_short_row_is_answered_while_a_long_one_goes_on() -> None:
    with Made() as made:
        long = made.make([6], "task3", 100, streams=True)
        made.engine.submit([long.row])
        wait(lambda: len(long.parts) > 2)
        (part,) = made.answered(made.make([7, 8], "task5", 2))
        assert part.text == expected("task5", [7, 8], 2) and not long.row.has_ended
        wait(lambda: long.row.has_ended)
    assert "".join(each.text for each in long.parts) == expected("task3", [6], 100)


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it() -> None:
    with Made() as made:
        options = {"temperature": 1.5, "seed": "7"}
        (by_itself,) = made.answered(made.make([6, 7], "task4", 12, **options))
        others = [made.make(text, task, 9, temperature=2.0, seed="7") for task, text in texts(7)]
        found = made.answered(*others[:3], made.make([6, 7], "task4", 12, **options), *others[3:])
    assert found[3].text == by_itself.text


def test_a_row_that_cannot_be_answered_fails_no_other_one() -> None:
    with Made() as made:
        with torch.no_grad():
            made.make.prompts["task2"].fill_(float("nan"))  # behind the back of whoever checks requests
        rows = [made.make([6, 7], None, 3) for _ in range(3)]
        rows[1] = made.make([6, 7], "task3", 3)
        rows[1].row.request = rows[0].row.request.__class__(0, [6, 7], "task2", 7, "")
        found = made.answered(*rows)
        assert found[0].text == found[2].text == expected(None, [6, 7], 3)
        assert found[1].status == 500 and "not finite" in (found[1].failure or "")


@pytest.mark.filterwarnings("ignore")
def test_a_pass_that_raises_is_tried_row_by_row() -> None:
    with Made() as made:
        rows = [made.make([6, 7], None, 3) for _ in range(3)]
        rows[1].row.request = rows[0].row.request.__class__(0, [6, 7], "unknown", 5, "")
        found = made.answered(*rows)
        assert found[0].text == found[2].text == expected(None, [6, 7], 3)
        assert found[1].status == 400 and "unknown" in (found[1].failure or "")


def test_a_step_that_raises_fails_its_rows_and_the_engine_goes_on(caplog, monkeypatch) -> None:
    with Made() as made:
        step = made.engine._batch.step
        failing = threading.Event()

        def broken() -> None:
            if failing.is_set():
                failing.clear()
                raise RuntimeError("the device is on fire")
            step()

        monkeypatch.setattr(made.engine._batch, "step", broken)
        one = made.make([6], "task1", 90, streams=True)
        made.engine.submit([one.row])
        wait(lambda: len(one.parts) > 1)
        failing.set()
        wait(lambda: one.row.has_ended)
        assert one.parts[-1].status == 500 and "fire" not in (one.parts[-1].failure or "")
        assert "the device is on fire" in caplog.text
        (part,) = made.answered(made.make([6], "task1", 3))
        assert part.text == expected("task1", [6], 3) and made.engine.is_alive


def test_a_row_gets_the_prompts_that_it_was_made_of_though_others_came_since() -> None:
    other = {task: [*ids[::-1], 44] for task, ids in RAGGED.items()}
    with Made() as made:
        make = RowMaking(made.model, prompts_of(other))
        long = made.make([6], "task3", 40, streams=True)
        made.engine.submit([long.row])
        wait(lambda: len(long.parts) > 2)
        asked = texts(12)
        rows = [(made.make, RAGGED) if place % 3 else (make, other) for place in range(12)]
        pairs = [
            (this(text, task, 5), hard, task, text) for (this, hard), (task, text) in zip(rows, asked, strict=True)
        ]
        found = made.answered(*(one for one, *_ in pairs))
        wait(lambda: long.row.has_ended)
    for part, (_, hard, task, text) in zip(found, pairs, strict=True):
        assert part.text == expected(task, text, 5, hard)
    assert "".join(each.text for each in long.parts) == expected("task3", [6], 40)


def test_labels_are_those_of_the_generator() -> None:
    made = labelled.generator()
    engine = Engine(made.model, words())
    reader = RequestReader(made.model, words(), made.prompts, made.prompts.templates)
    engine.start()
    parts: dict[int, Part] = {}
    rows = []
    for index, (given, task, _) in enumerate(labelled.ROWS):
        if task not in labelled.LABELS:
            continue
        labels = [label.strip() for label in made.prompts.templates[task].labels]
        request = reader.to_answer(index, given, task, 1)
        rows.append(LabelRow(request, made.prompts, lambda part, i=index: parts.update({i: part}), labels=labels))
    assert engine.submit(rows)
    wait(lambda: all(row.has_ended for row in rows))
    engine.stop()
    engine.join(10)
    answers = MixedTaskGenerator(made.model, words()).answer(**labelled.split())
    assert {index: part.text for index, part in parts.items()} == {index: answers[index] for index in parts}


def test_what_has_no_room_is_not_taken_and_who_leaves_makes_room(monkeypatch) -> None:
    with Made(max_queue=3, max_rows=1) as made:
        step, gate = made.engine._batch.step, threading.Event()
        monkeypatch.setattr(made.engine._batch, "step", lambda: gate.wait(20) and step())
        rows = [made.make([6], "task1", 3) for _ in range(6)]
        assert made.engine.submit([rows[0].row])
        wait(lambda: made.engine.running == 1 and not made.engine.waiting)
        assert made.engine.submit([one.row for one in rows[1:3]])
        assert not made.engine.submit([one.row for one in rows[3:5]]) and made.engine.waiting == 2
        rows[1].row.is_cancelled = True
        assert made.engine.submit([one.row for one in rows[3:5]]) and made.engine.waiting == 3
        gate.set()
        wait(lambda: all(rows[place].row.has_ended for place in (0, 2, 3, 4)))
    assert not rows[1].parts and not rows[5].parts


def test_it_ends_when_its_rows_have_ended_or_patience_has() -> None:
    with Made() as made:
        rows = [made.make([6], "task1", 30) for _ in range(3)]
        made.engine.submit([one.row for one in rows])
        made.engine.stop(patience=20)
        made.engine.join(20)
        assert {one.parts[0].text for one in rows} == {expected("task1", [6], 30)}
        late = made.make([6], "task1", 1)
        assert made.engine.submit([late.row]) and late.parts == [Part(failure=STOPPED, status=503)]
    with Made(max_rows=1) as made:
        rows = [made.make([6], "task1", 100) for _ in range(3)]
        made.engine.submit([one.row for one in rows])
        wait(lambda: made.engine.running == 1)
        made.engine.stop()
        made.engine.join(20)
        assert rows[2].parts == [Part(failure=STOPPED, status=503)] and made.engine.running == 0


def test_a_model_that_takes_no_prompts_is_refused() -> None:
    with pytest.raises(SoftPromptError, match="cannot take soft prompts"):
        Engine(models.build("cpmant"), words())


def test_rows_that_would_depend_on_those_beside_them_are_too_long() -> None:
    model = tiny.tiny_model()
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model.config.max_position_embeddings = 96
    assert Engine(model, words(), Limits(max_batch_tokens=500)).longest == 96
    assert Engine(tiny.tiny_model(), words(), Limits(max_batch_tokens=50)).longest == 50


def test_prompts_that_are_attached_already_are_taken_as_they_are() -> None:
    made = Made()
    attach(made.model, made.make.prompts)
    with made:
        (part,) = made.answered(made.make([6], "task4", 3))
    assert part.text == expected("task4", [6], 3)

"""Which rows begin: in their order, as many as fit, of one state of the prompts."""

from __future__ import annotations

import random
from collections import deque
from itertools import combinations, pairwise

import pytest

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.requests import Request
from lightning_softprompt.serving.admission import Admission, Limits, in_passes
from lightning_softprompt.serving.rows import LabelRow, Row, TextRow

OLD, NEW = object(), object()


def text(length: int, new: int = 4, prompts=OLD) -> TextRow:
    return TextRow(Request(0, [5] * length, None, length + new, ""), prompts, print)


def label(length: int, prompts=OLD) -> LabelRow:
    return LabelRow(Request(0, [5] * length, None, length + 1, "", ([6], [7]), 1), prompts, print)


def admitted(waiting: list[Row], running: list[TextRow] | None = None, **limits: int) -> tuple[list[int], list[Row]]:
    """The places of the rows that begin, and what is left in the queue."""
    queue = deque(waiting)
    found = Admission(Limits(**limits), running or [], queue)
    begun = [*found.texts, *found.labels]
    return sorted(next(i for i, row in enumerate(waiting) if row is one) for one in begun), list(queue)


def test_as_many_begin_as_fit_when_their_answers_are_complete() -> None:
    rows: list[Row] = [text(6), text(6), text(6), text(6)]
    assert admitted(rows, max_batch_tokens=30)[0] == [0, 1, 2]
    assert admitted(rows, max_rows=2)[0] == [0, 1]
    assert admitted(rows, running=[text(6)], max_batch_tokens=30)[0] == [0, 1]
    assert admitted(rows, running=[text(26)], max_batch_tokens=60)[0] == [0]


def test_no_row_overtakes_another() -> None:
    long = text(96)
    rows: list[Row] = [text(6), long, text(6)]
    begun, left = admitted(rows, running=[text(6)], max_batch_tokens=200)
    assert begun == [0] and left == rows[1:]
    assert admitted([long], max_batch_tokens=100)[0] == [0]


def test_a_long_text_is_read_by_itself() -> None:
    assert admitted([text(6), text(1500), text(6), text(1500)], max_batch_tokens=10**6)[0] == [0]
    assert admitted([text(1500), text(6)], max_batch_tokens=10**6)[0] == [0]
    assert admitted([text(9000), text(6)], max_batch_tokens=10**6)[0] == [0]


def test_labels_take_no_place_in_the_running_batch() -> None:
    running = [text(6)] * 2
    assert admitted([label(6), label(6), text(6)], running=running, max_rows=2)[0] == [0, 1]
    assert admitted([label(1500), label(6), label(1500)])[0] == [0]


def test_rows_of_two_states_of_the_prompts_never_begin_together() -> None:
    rows: list[Row] = [text(6), label(6), text(6, prompts=NEW), text(6)]
    begun, left = admitted(rows)
    assert begun == [0, 1] and left == rows[2:]
    assert admitted(left)[0] == [0]


def test_rows_that_nobody_waits_for_are_dropped_wherever_they_stand() -> None:
    rows: list[Row] = [text(6), text(6), text(6), text(6)]
    rows[0].is_cancelled = rows[3].is_cancelled = True
    begun, left = admitted(rows, max_rows=1)
    assert begun == [1] and left == [rows[2]]


@pytest.mark.parametrize("name", ["max_rows", "max_batch_tokens", "max_queue"])
def test_a_limit_is_at_least_one(name: str) -> None:
    with pytest.raises(SoftPromptError, match=f"{name} must be at least 1, got 0"):
        Limits(**{name: 0})


def cheapest(lengths: list[int], fetching: int) -> int:
    """The least that passes of neighbours in length cost, by trying all."""
    ordered, places = sorted(lengths), range(1, len(lengths))
    cuts = [[0, *cut, len(lengths)] for count in range(len(lengths)) for cut in combinations(places, count)]
    return min(sum(fetching + (end - begin) * ordered[end - 1] for begin, end in pairwise(cut)) for cut in cuts)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("device, fetching", [("cpu", 32), ("cuda", 300), ("mps", 300)])
def test_passes_are_those_that_cost_least(device: str, fetching: int, seed: int) -> None:
    draw = random.Random(seed)
    rows = [text(draw.choice([draw.randint(1, 30), draw.randint(1, 400)])) for _ in range(draw.randint(1, 9))]
    passes = in_passes(rows, device)
    assert sorted(id(row) for each in passes for row in each) == sorted(map(id, rows))
    cost = sum(fetching + len(each) * max(len(row.request.ids) for row in each) for each in passes)
    assert cost == cheapest([len(row.request.ids) for row in rows], fetching)


def test_rows_of_like_length_are_read_together() -> None:
    assert [len(each) for each in in_passes([text(8), text(400), text(8), text(9)], "cpu")] == [1, 3]
    assert [len(each) for each in in_passes([text(8), text(30)], "cuda")] == [2]
    assert in_passes([], "cpu") == []

"""Requests in batches: how full they are, what happens without memory, and answers in the order of the call."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_softprompt import SoftPromptError
from lightning_softprompt.inference.answers import Answers
from lightning_softprompt.inference.batches import answer_in_batches, check_budget, in_batches, report, servable
from lightning_softprompt.inference.requests import Request

DRAW = random.Random(0)
REQUESTS = [
    Request(index, [index], None, DRAW.randint(1, 12), "make it short", rows=DRAW.randint(1, 4)) for index in range(50)
]


class Run:
    """Answers a request with its number; remembers the batches, and has memory for so many tokens."""

    def __init__(self, memory: int = 10**9) -> None:
        self.memory = memory
        self.batches: list[list[Request]] = []
        self.failed = 0

    def __call__(self, batch: list[Request]) -> list[int]:
        if tokens(batch) > self.memory:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(batch)
        return [request.ids[0] for request in batch]


def tokens(batch: list[Request]) -> int:
    return sum(request.rows for request in batch) * max(request.length for request in batch)


def answered(run: Run, budget: int) -> Answers[int]:
    return answer_in_batches(len(REQUESTS), REQUESTS.__getitem__, run, budget, None)


@pytest.mark.parametrize("budget", [1, 30, 100, 10**6])
def test_a_budget_counts_the_rows_of_a_request(budget: int) -> None:
    run = Run()
    assert answered(run, budget) == list(range(50))
    assert all(tokens(batch) <= budget or len(batch) == 1 for batch in run.batches)
    sent = [request for batch in run.batches for request in batch]
    assert [request.length for request in sent] == sorted((r.length for r in REQUESTS), reverse=True)
    for batch, following in zip(run.batches, run.batches[1:], strict=False):
        assert tokens([*batch, following[0]]) > budget


def test_without_memory_batches_are_halved_until_they_fit(caplog) -> None:
    run = Run(memory=30)
    found = answered(run, 10**6)
    too_long = [request.index for request in REQUESTS if request.rows * request.length > 30]
    assert too_long and found == [None if index in too_long else index for index in range(50)]
    assert found.failures == {
        index: f"there is no memory for its {REQUESTS[index].rows * REQUESTS[index].length} tokens; make it short"
        for index in too_long
    }
    assert caplog.text.count("out of memory; going on with max_batch_tokens=") == run.failed - len(too_long)
    assert 1 <= run.failed - len(too_long) <= 7


def test_what_cannot_be_read_is_a_failure_and_other_errors_are_raised() -> None:
    def read(index: int) -> Request:
        if index == 7:
            raise SoftPromptError("nothing to read")
        return REQUESTS[index]

    found = answer_in_batches(50, read, Run(), 60, None)
    assert found == [None if index == 7 else index for index in range(50)]
    assert found.failures == {7: "nothing to read"}

    def fail(batch: list[Request]) -> list[int]:
        raise SoftPromptError("the options are wrong")

    with pytest.raises(SoftPromptError, match="the options are wrong"):
        answer_in_batches(50, read, fail, 60, None)
    assert answer_in_batches(0, read, fail, 60, None) == []


def test_labels_and_free_text_share_no_batch() -> None:
    mixed = [
        Request(index, [index], None, length, "make it short", labels=([5],) * (index % 2), rows=1)
        for index, length in enumerate([3, 9, 9, 4, 5, 4])
    ]
    run = Run()
    assert answer_in_batches(6, mixed.__getitem__, run, 10**6, None) == [*range(6)]
    assert [[request.index for request in batch] for batch in run.batches] == [[1, 3, 5], [2, 4, 0]]


def test_what_comes_in_parts_begins_anew_without_memory() -> None:
    failures: dict[int, str] = {}

    def run(batch: list[Request]):
        for step in range(3):
            if step == 1 and tokens(batch) > 30:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield from [(request.index, step) for request in batch]

    pending = servable(50, REQUESTS.__getitem__, failures)
    told: dict[int, list[int]] = {}
    for index, step in in_batches(pending, run, 10**6, failures):
        told.setdefault(index, []).append(step)
    assert len(pending) == 50
    assert set(failures) == {request.index for request in REQUESTS if request.rows * request.length > 30} != set()
    for index, steps in told.items():
        assert steps[-3:] == [0, 1, 2] if index not in failures else set(steps) == {0}


def test_failures_are_reported_once_and_a_budget_is_checked(caplog) -> None:
    report({}, 3)
    assert not caplog.records
    report({2: "nothing to read"}, 3)
    assert caplog.messages == ["1 of 3 requests have no answer. request 2: nothing to read"]
    check_budget(1)
    with pytest.raises(SoftPromptError, match="max_batch_tokens must be at least 1, got -3"):
        check_budget(-3)


def test_a_batch_that_fails_costs_the_others_nothing() -> None:
    run = Run()

    def fails_for_seven(batch: list[Request]) -> list[int]:
        if any(request.index == 7 for request in batch):
            raise RuntimeError("an error of the device")
        return run(batch)

    answers = answer_in_batches(len(REQUESTS), REQUESTS.__getitem__, fails_for_seven, 60, None)
    lost = {index for index, answer in enumerate(answers) if answer is None}
    assert 7 in lost and len(lost) < 25 and set(answers.failures) == lost
    assert answers.failures[7] == "its batch failed: RuntimeError: an error of the device"
    assert all(answer == index for index, answer in enumerate(answers) if index not in lost)


@pytest.mark.parametrize("error", [RuntimeError("always"), SoftPromptError("at once")])
def test_what_every_batch_fails_of_is_raised(error: Exception) -> None:
    calls = []

    def fails(batch: list[Request]) -> list[int]:
        calls.append(batch)
        raise error

    with pytest.raises(type(error), match=str(error)):
        answer_in_batches(len(REQUESTS), REQUESTS.__getitem__, fails, 60, None)
    assert (len(calls) == 1) == isinstance(error, SoftPromptError)

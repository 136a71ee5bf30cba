"""Which training rows come how often, in which order, on which rank."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest

from lightning_softprompt import SoftPromptError
from lightning_softprompt.data.mixing import TaskMixing

SIZES = {"big": 600, "middle": 90, "small": 13}
TASKS = [task for task, size in SIZES.items() for _ in range(size)]


def epochs(mixing: TaskMixing, count: int) -> list[list[int]]:
    found = []
    for epoch in range(count):
        mixing.set_epoch(epoch)
        found.append(list(mixing))
    return found


def test_by_default_every_row_comes_once_an_epoch_in_the_order_of_seed_and_epoch() -> None:
    first, second = epochs(TaskMixing(TASKS, seed=3), 2)
    assert sorted(first) == sorted(second) == list(range(len(TASKS))) and first != second
    assert epochs(TaskMixing(TASKS, seed=3), 2) == [first, second]
    assert epochs(TaskMixing(TASKS, seed=4), 1) != [first]
    assert Counter(TASKS[row] for row in first[:70])["big"] < 70  # mixed


@pytest.mark.parametrize("temperature, limit", [(1.0, None), (2.0, None), (5.0, 100), (1.0, 50), (math.inf, None)])
def test_shares_are_those_of_t5(temperature: float, limit: int | None) -> None:
    weights = {task: min(size, limit or size) ** (1 / temperature) for task, size in SIZES.items()}
    for order in epochs(TaskMixing(TASKS, 0, temperature, limit), 3):
        counts = Counter(TASKS[row] for row in order)
        assert sum(counts.values()) == len(TASKS)
        for task, weight in weights.items():
            assert abs(counts[task] - len(TASKS) * weight / sum(weights.values())) < 1


def test_over_epochs_all_rows_of_a_task_come_equally_often() -> None:
    seen = Counter(row for order in epochs(TaskMixing(TASKS, 0, temperature=math.inf), 12) for row in order)
    for task in SIZES:
        times = {seen[row] for row, other in enumerate(TASKS) if other == task}
        assert max(times) - min(times) <= 1 and min(times) >= 4


def test_tasks_in_turn() -> None:
    (order,) = epochs(TaskMixing(TASKS, 0, round_robin=True), 1)
    names = [TASKS[row] for row in order[: 3 * 234]]
    assert all({*names[at : at + 3]} == set(SIZES) for at in range(0, len(names), 3)) and len(order) == len(TASKS)


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = [1 + (37 * row) % 101 for row in range(len(TASKS))]

    def pads(order: list[int]) -> int:
        batches = [[lengths[row] for row in order[at : at + 8]] for at in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    plain = epochs(TaskMixing(TASKS, 0), 1)[0]
    grouped, again = epochs(TaskMixing(TASKS, 0, lengths=lengths, batch_size=8), 2)
    assert sorted(grouped) == sorted(plain) and pads(grouped) < 0.1 * pads(plain) and grouped != again
    firsts = [lengths[order] for order in grouped[::8]]
    assert any(one < other for one, other in pairwise(firsts)) and any(one > other for one, other in pairwise(firsts))


@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_share_the_rows_out(grouped: bool, monkeypatch) -> None:
    from lightning_softprompt.data import mixing

    lengths = [1 + (37 * row) % 101 for row in range(len(TASKS))] if grouped else None
    alone = list(TaskMixing(TASKS, 0, temperature=2.0, lengths=lengths, batch_size=8))
    monkeypatch.setattr(mixing, "has_several_ranks", lambda: True)
    monkeypatch.setattr(mixing.distributed, "get_world_size", lambda: 4)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(mixing.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(list(TaskMixing(TASKS, 0, temperature=2.0, lengths=lengths, batch_size=2)))
    assert {len(part) for part in parts} == {176}
    together = [row for step in zip(*parts, strict=True) for row in step]
    assert together[: len(alone)] == alone and together[len(alone) :] == alone[:1]


def test_a_task_without_a_share_and_an_epoch_without_rows() -> None:
    assert list(TaskMixing([], 0)) == []
    assert sorted(TaskMixing(["a"], 0, temperature=3.0)) == [0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"size_limit": 0}, "size_limit must be at least 1"),
        ({"round_robin": True, "lengths": [1, 1]}, "choose one of them"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, message: str) -> None:
    with pytest.raises(SoftPromptError, match=message):
        TaskMixing(["a", "b"], 0, **options)


@pytest.mark.parametrize("temperature", [0.5, 0.001])
def test_every_task_trains_however_small_its_share(temperature: float) -> None:
    (order,) = epochs(TaskMixing(["big"] * 1000 + ["small"] * 10, 0, temperature), 1)
    assert sum(row >= 1000 for row in order) == 1 and len(order) == 1010

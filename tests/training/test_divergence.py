"""The divergence of distributions, against sums over tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_softprompt import SoftPrompts, Tokens, attach
from lightning_softprompt.training.divergence import Taught, answer_log_probabilities
from tests import tiny


def drawn(seed: int, positions: int = 5, tokens: int = 11) -> torch.Tensor:
    return torch.randn(positions, tokens, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def summed(teacher: list[float], student: list[float]) -> float:
    return sum(math.exp(t) * (t - s) for t, s in zip(teacher, student, strict=True))


def test_the_divergence_is_that_of_the_student_from_the_teacher() -> None:
    teacher, student = drawn(0), drawn(1)
    found = Taught(teacher).divergence(student)
    for position, value in enumerate(found.tolist()):
        there, back = teacher[position].double().tolist(), student[position].double().tolist()
        assert value == pytest.approx(summed(there, back), rel=1e-5)
        assert value != pytest.approx(summed(back, there), rel=1e-2)
    assert Taught(teacher).first().tolist() == [max(range(11), key=row.__getitem__) for row in teacher.tolist()]


@pytest.mark.parametrize("count", [1, 4, 10])
def test_all_but_the_likeliest_count_as_one(count: int) -> None:
    teacher, student = drawn(0), drawn(1)
    kept = Taught(teacher).likeliest(count)
    assert kept.tokens.shape == (5, count) and kept.log_probabilities.shape == (5, count + 1)
    assert kept.first().tolist() == Taught(teacher).first().tolist()
    for position, value in enumerate(kept.divergence(student).tolist()):
        there, back = teacher[position].double().tolist(), student[position].double().tolist()
        likeliest = sorted(range(11), key=there.__getitem__, reverse=True)
        parts = [[each[token] for token in likeliest[:count]] for each in (there, back)]
        for part, each in zip(parts, (there, back), strict=True):
            part.append(math.log(sum(math.exp(each[token]) for token in likeliest[count:])))
        assert value == pytest.approx(summed(*parts), rel=1e-4, abs=1e-6)
        assert value <= summed(there, back) + 1e-6


def test_gradients_go_through_the_likeliest_to_the_student() -> None:
    logits = drawn(1).double().requires_grad_()
    kept = Taught(drawn(0).double()).likeliest(3)
    assert torch.autograd.gradcheck(lambda given: kept.divergence(given.log_softmax(-1)), (logits,))


def test_positions_are_those_that_predict_the_answers() -> None:
    hard = {"a": [5, 6, 7], "b": [9]}
    model, bare = tiny.tiny_model(), tiny.tiny_model().double()
    attach(model, SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in hard.items()}))
    rows = [("a", [11, 12], [13]), ("b", [14], [15, 16, 17]), (None, [18, 19, 20, 21], [22, 23])]
    tasks, texts, answers = map(list, zip(*rows, strict=True))
    found = answer_log_probabilities(model, texts, answers, tasks, pad=1)
    expected = []
    for task, text, answer in rows:
        logits = tiny.hard_row(bare, tiny.Row(0, hard.get(task or "", []), text + answer))
        expected.append(logits[len(text) - 1 : len(text) + len(answer) - 1].log_softmax(-1))
    assert found.dtype == torch.float32 and found.shape == (6, tiny.VOCABULARY)
    assert tiny.relative_error(found.detach().double(), torch.cat(expected)) < 1e-5

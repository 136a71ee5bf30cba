"""The next token of each row: what the row alone would get, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from lightning_softprompt.serving.sampling import Sampler, choose


def logits(rows: int, seed: int = 0, vocabulary: int = 40) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_without_temperature_the_likeliest_token_is_taken() -> None:
    found = choose(logits(5), [Sampler() for _ in range(5)])
    assert [choice.token for choice in found] == logits(5).argmax(-1).tolist()
    assert found[0].logprob is None and found[0].likeliest == ()


def test_a_row_draws_the_same_tokens_beside_others_as_alone() -> None:
    """Whatever the others are, in whatever order, and however many numbers they draw."""
    steps = [logits(4, seed) for seed in range(30)]

    def drawn(rows: list[int]) -> dict[int, list[int]]:
        samplers = {row: Sampler(temperature=1.5, top_p=(0.5, 0.9, 1.0, 1.0)[row], seed=f"{row}") for row in rows}
        samplers |= {3: Sampler()} if 3 in rows else {}
        found: dict[int, list[int]] = {row: [] for row in rows}
        for step in steps:
            for row, choice in zip(rows, choose(step[rows], [samplers[row] for row in rows]), strict=True):
                found[row].append(choice.token)
        return found

    together = drawn([2, 0, 3, 1])
    assert all(drawn([row])[row] == together[row] for row in range(4))
    assert len(set(together[2])) > 5 and together[0] != together[1]
    assert together[3] == [int(step[3].argmax()) for step in steps]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.3, 0.8), (1.0, 0.3), (1.0, 0.0)])
def test_tokens_are_drawn_with_the_probabilities_of_transformers(temperature: float, top_p: float) -> None:
    of_row = logits(1, vocabulary=8)
    warped = of_row / temperature
    expected = (TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped).softmax(-1)[0]
    count = 4000
    samplers = [Sampler(temperature, top_p, seed=f"{row}") for row in range(count)]
    tokens = torch.tensor([choice.token for choice in choose(of_row.expand(count, -1), samplers)])
    shares = torch.bincount(tokens, minlength=8) / count
    assert (shares - expected).abs().max() < 4 * 0.5 / count**0.5
    assert bool((shares[expected == 0] == 0).all())


@pytest.mark.parametrize("temperature", [1e-5, 2.0])
def test_logits_of_any_size_are_drawn_from(temperature: float) -> None:
    wide = torch.tensor([[3e38, -3e38, 0.0], [0.0, 1e4, -1e4]])
    found = choose(wide, [Sampler(temperature), Sampler(temperature)])
    assert [choice.token for choice in found] == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_their_own_row(bad: float, temperature: float) -> None:
    mixed = logits(3)
    mixed[1, 4] = bad
    found = choose(mixed, [Sampler(temperature, seed="1") for _ in range(3)])
    expected = choose(logits(3), [Sampler(temperature, seed="1") for _ in range(3)])
    assert found[1] is None and [found[0], found[2]] == [expected[0], expected[2]]


def test_no_end_token_comes_before_the_fewest_tokens() -> None:
    of_row = logits(2)
    best = of_row[0].argsort(descending=True).tolist()
    ends = frozenset(best[:2])
    waits, ends_at_once = Sampler(min_tokens=2, end_tokens=ends), Sampler(end_tokens=ends)
    both = of_row[[0, 0]]
    first, second, third = (choose(both, [waits, ends_at_once]) for _ in range(3))
    assert [each[0].token for each in (first, second, third)] == [best[2], best[2], best[0]]
    assert first[1].token == best[0] and torch.equal(both, of_row[[0, 0]])


def test_log_probabilities_are_those_of_the_model() -> None:
    of_rows = logits(3)
    expected = of_rows.log_softmax(-1)
    none, few, many = choose(of_rows, [Sampler(logprobs=0), Sampler(0.7, 0.5, "3", logprobs=2), Sampler(logprobs=99)])
    assert none.logprob == pytest.approx(float(expected[0].max())) and none.likeliest == []
    assert few.logprob == pytest.approx(float(expected[1, few.token])) and len(few.likeliest) == 2
    assert [token for token, _ in many.likeliest] == of_rows[2].argsort(descending=True).tolist()
    assert [score for _, score in many.likeliest] == pytest.approx(expected[2].sort(descending=True).values.tolist())

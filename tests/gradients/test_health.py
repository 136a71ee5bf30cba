"""The numbers and limits that the gradient callbacks rest on, against loops, numpy and the papers' formulas."""

from __future__ import annotations

import itertools
import math
import random

import numpy
import pytest
import torch

from lightning_softprompt.gradients.health import FIRST, WINDOW, Health
from lightning_softprompt.gradients.limits import AutoClip, ZClip
from lightning_softprompt.prompts import statistics


@pytest.mark.parametrize("length", [1, 2, 9])
def test_token_similarity_is_the_mean_cosine_of_all_pairs(length: int) -> None:
    prompt = torch.randn(length, 7, generator=torch.Generator().manual_seed(length))
    pairs = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.permutations(prompt, 2)]
    expected = sum(pairs) / len(pairs) if pairs else 0.0
    assert float(statistics.token_similarity(prompt)) == pytest.approx(expected, abs=1e-6)


def test_task_similarities_are_cosines_of_mean_tokens() -> None:
    prompts = [torch.randn(length, 5, generator=torch.Generator().manual_seed(length)) for length in (2, 3, 4)]
    found = statistics.task_similarities(prompts)
    for (i, one), (j, other) in itertools.product(enumerate(prompts), repeat=2):
        expected = torch.cosine_similarity(one.mean(0), other.mean(0), dim=0)
        assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-6)
    above = [float(found[i, j]) for i in range(3) for j in range(3) if i != j]
    assert float(statistics.mean_of_pairs(found)) == pytest.approx(sum(above) / 6, abs=1e-6)
    assert float(statistics.mean_of_pairs(found[:1, :1])) == 0


def test_effective_rank_counts_directions() -> None:
    rank = 3
    base = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    prompt = torch.cat([base[:rank], torch.zeros(5, 8)])
    assert float(statistics.effective_rank(prompt)) == pytest.approx(rank, rel=1e-5)
    values = numpy.linalg.svd(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).numpy(), compute_uv=False)
    shares = values / values.sum()
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    assert float(statistics.effective_rank(matrix)) == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(statistics.effective_rank(torch.zeros(3, 4)))
    assert torch.isnan(statistics.effective_rank(torch.full((3, 4), torch.nan)))


def test_vocabulary_distance_is_zero_inside_the_band() -> None:
    embedding = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Embedding.from_pretrained(embedding)
    band = statistics.norm_band(module, 1000, torch.device("cpu"))
    norms = embedding.norm(dim=1).numpy()
    expected = [numpy.percentile(norms, place, method="nearest") for place in (1, 50, 99)]
    assert band.tolist() == pytest.approx(expected, rel=1e-3)
    low, median, high = band.tolist()
    unit = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    for norm, distance in ((median, 0.0), (high + 2 * median, 2.0), (low / 2, -low / 2 / median)):
        assert float(statistics.vocabulary_distance(unit * norm, band)) == pytest.approx(distance, abs=1e-5)


def test_autoclip_is_the_percentile_of_all_norms_so_far() -> None:
    draw, clip, seen = random.Random(0), AutoClip(), []
    for _ in range(200):
        seen.append(draw.lognormvariate(0, 1))
        assert clip.next(seen[-1]) == pytest.approx(numpy.percentile(seen, 10))
    again = AutoClip(**clip.state())
    assert again.next(0.5) == clip.next(0.5)


def test_zclip_follows_its_paper() -> None:
    draw = random.Random(0)
    norms = [abs(draw.gauss(1, 0.2)) for _ in range(60)]
    norms[40], norms[50] = 30.0, 9.0
    clip, clipped = ZClip(), []
    mean, variance = numpy.mean(norms[:25]), numpy.var(norms[:25])
    for step, norm in enumerate(norms):
        limit = clip.next(norm)
        if step < 25:
            assert limit == math.inf
            continue
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        if z > 2.5:
            expected = mean + 2.5 * math.sqrt(variance) / (z / 2.5)
            assert limit == pytest.approx(expected) and limit < norm
            clipped.append(step)
            norm = expected
        else:
            assert limit == math.inf
        mean = 0.97 * mean + 0.03 * norm
        variance = 0.97 * variance + 0.03 * (norm - mean) ** 2
    assert {40, 50} <= set(clipped)
    again = ZClip(**clip.state())
    assert again.next(50.0) == clip.next(50.0)


def healthy(patience: int = 3) -> Health:
    """A task after its start: losses around 2, norms around 1."""
    health, draw = Health(patience), random.Random(0)
    for _ in range(FIRST):
        assert health.step(draw.gauss(2, 0.1), draw.gauss(1, 0.1), (10.0, 0.1)) is None
    return health


def feed(health: Health, count: int, loss: float, norm: float = 1.0, signals=(10.0, 0.1)) -> list[str]:
    draw = random.Random(1)
    found = [health.step(draw.gauss(loss, 0.05), norm, signals) for _ in range(count)]
    return [symptom.seen for symptom in found if symptom is not None]


def test_a_task_that_learns_or_stands_still_is_well() -> None:
    for loss in (2.0, 1.0, 0.01):
        health = healthy()
        assert feed(health, 400, loss) == [] and health.is_vouched_for and health.ends_badly() is None


def test_noise_alone_is_no_collapse() -> None:
    draw = random.Random(0)
    for _ in range(200):
        health = Health(3)
        for _ in range(200):
            assert health.step(max(draw.gauss(2, 0.8), 0.0), draw.lognormvariate(0, 0.5), (10.0, 0.1)) is None


def test_a_loss_above_its_start_is_a_collapse_after_patience_looks() -> None:
    health = healthy()
    assert feed(health, 3 * WINDOW - 1, 3.0) == [] and not health.is_vouched_for
    assert health.ends_badly()
    assert feed(health, 1, 3.0) == ["collapse"]
    health.rewound()
    assert not health.ends_badly() and feed(health, 3 * WINDOW - 1, 3.0) == []


@pytest.mark.parametrize("losses", [(3.0, 30.0), (1e3, 1e3, 2.1, 1e6), tuple(2.0**step for step in range(2, 50))])
def test_losses_that_swing_or_run_away_are_a_collapse(losses) -> None:
    health, found = healthy(), []
    for loss in itertools.islice(itertools.cycle(losses), 12):
        found.append(health.step(loss, 1.0, (10.0, 0.1)))
    assert found[-1] is not None and found[-1].seen == "collapse"


@pytest.mark.parametrize(
    "norm, signals, said",
    [(1e-5, (10.0, 0.1), "vanished"), (1.0, (200.0, 0.1), "drifted"), (1.0, (10.0, 0.999), "become one")],
)
def test_odd_signals_are_a_collapse_where_the_loss_is_not_below_its_start(norm, signals, said) -> None:
    health = healthy()
    found = [health.step(2.05, norm, signals) for _ in range(60)]
    assert any(symptom is not None and symptom.seen == "collapse" and said in symptom.detail for symptom in found)
    health = healthy()
    assert feed(health, 60, 1.0, norm, signals) == []


def test_a_spike_is_told_from_a_new_level() -> None:
    health = healthy()
    assert feed(health, 1, 2.0, 300.0) == ["spike"] and health.spikes == 1
    assert feed(health, 1, 2.0) == [] and not health.spikes
    assert feed(health, 40, 2.0, 300.0) == ["spike"] * 3
    assert feed(health, 40, 2.0, 400.0) == []


def test_a_task_that_has_learnt_may_meet_a_hard_row() -> None:
    health = healthy()
    assert feed(health, 100, 0.01, 1e-5) == []
    assert feed(health, 1, 0.5, 1.0) == []


def test_steps_in_a_row_that_are_not_finite_are_a_collapse() -> None:
    health = healthy()
    bad = ((math.nan, 1.0), (2.0, math.inf), (None, math.nan), (math.inf, 1.0))
    seen = [health.step(loss, norm, None) for loss, norm in bad]
    assert [symptom.seen for symptom in seen] == ["nonfinite"] * 3 + ["collapse"]
    assert health.step(2.0, 1.0, None) is None and health.not_finite == 0

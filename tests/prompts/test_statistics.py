"""The numbers that tell a healthy prompt from one that has collapsed, against loops and numpy."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

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

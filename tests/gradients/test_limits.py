"""AutoClip and ZClip against numpy and the formulas of their papers."""

from __future__ import annotations

import math
import random
from dataclasses import asdict

import numpy
import pytest

from lightning_softprompt.gradients.limits import AutoClip, ZClip


def test_autoclip_is_the_percentile_of_all_norms_so_far() -> None:
    draw, clip, seen = random.Random(0), AutoClip(), []
    for _ in range(200):
        seen.append(draw.lognormvariate(0, 1))
        assert clip.next(seen[-1]) == pytest.approx(numpy.percentile(seen, 10))
    again = AutoClip(**asdict(clip))
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
    again = ZClip(**asdict(clip))
    assert again.next(50.0) == clip.next(50.0)

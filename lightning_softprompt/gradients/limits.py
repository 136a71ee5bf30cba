"""How large a gradient norm may be, from the norms seen so far: AutoClip and ZClip. Plain Python."""

from __future__ import annotations

import bisect
import math
from typing import Any, Protocol

# The papers' own settings.
PERCENTILE = 10.0  # AutoClip
Z_THRESHOLD, SMOOTHING, WARM_UP = 2.5, 0.97, 25  # ZClip
WEIGHT_RATIO, LEAST_WEIGHT_NORM = 0.01, 1e-3  # AGC


class Limit(Protocol):
    """The limit of one norm's history."""

    def next(self, norm: float) -> float:
        """Take note of a norm above 0, as it is before clipping, and say how large it may be; infinite: any size."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the keyword arguments that make it again."""


class AutoClip:
    """The p-th percentile of all norms so far, the newest included (arXiv 2007.14469, equation 3; p = 10).

    Example:
        >>> clip = AutoClip()
        >>> [round(clip.next(norm), 2) for norm in (1.0, 2.0, 3.0)]
        [1.0, 1.1, 1.2]
    """

    def __init__(self, norms: list[float] | None = None) -> None:
        self.norms = list(norms or ())  # ascending

    def next(self, norm: float) -> float:
        """Add a norm and give the percentile."""
        bisect.insort(self.norms, norm)
        position = PERCENTILE / 100 * (len(self.norms) - 1)
        below = math.floor(position)
        above = min(below + 1, len(self.norms) - 1)
        return self.norms[below] + (position - below) * (self.norms[above] - self.norms[below])

    def state(self) -> dict[str, Any]:
        """All norms."""
        return {"norms": list(self.norms)}


class ZClip:
    """Norms more than 2.5 standard deviations above a moving mean come down to mean + 2.5² / z deviations.

    arXiv 2504.02507, section 3: mean and variance start as those of the first 25 norms, which are not clipped by it,
    and then move with 0.97; a norm that was clipped moves them as what it was clipped to.

    Example:
        >>> clip = ZClip()
        >>> for step in range(25):
        ...     _ = clip.next(1.0 + step % 2)
        >>> clip.next(1.5), round(clip.next(100.0), 1)
        (inf, 1.5)
    """

    def __init__(self, first: list[float] | None = None, mean: float = 0.0, variance: float = 0.0) -> None:
        self.first = list(first or ())
        self.mean = mean
        self.variance = variance

    def next(self, norm: float) -> float:
        """What a norm that stands out comes down to; infinite for one that does not, and in the warm-up."""
        if len(self.first) < WARM_UP:
            self.first.append(norm)
            if len(self.first) == WARM_UP:
                self.mean = sum(self.first) / WARM_UP
                self.variance = sum((value - self.mean) ** 2 for value in self.first) / WARM_UP
            return math.inf
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / (deviation + 1e-6)
        limit = self.mean + Z_THRESHOLD**2 / z * deviation if z > Z_THRESHOLD else math.inf
        kept = min(norm, limit)
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * kept
        self.variance = SMOOTHING * self.variance + (1 - SMOOTHING) * (kept - self.mean) ** 2
        return limit

    def state(self) -> dict[str, Any]:
        """The first norms, mean and variance."""
        return {"first": list(self.first), "mean": self.mean, "variance": self.variance}

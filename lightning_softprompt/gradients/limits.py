"""How large a gradient norm may be, computed from the norms so far: AutoClip and ZClip. Plain Python."""

from __future__ import annotations

import bisect
import math
from typing import Any, Protocol

# The settings of the papers.
PERCENTILE = 10.0  # AutoClip
Z_THRESHOLD, SMOOTHING, WARM_UP = 2.5, 0.97, 25  # ZClip
WEIGHT_RATIO, LEAST_WEIGHT_NORM = 0.01, 1e-3  # AGC


class Limit(Protocol):
    """A limit for one norm that is computed from the norm's past values."""

    def next(self, norm: float) -> float:
        """Note a norm above 0, as it is before clipping, and return how large it may be; infinity sets no limit."""

    def state(self) -> dict[str, Any]:
        """The keyword arguments that make this limit again, for a checkpoint."""


class AutoClip:
    """The p-th percentile of all norms so far, the newest included (arXiv 2007.14469, equation 3; p = 10).

    Example:
        >>> clip = AutoClip()
        >>> [round(clip.next(norm), 2) for norm in (1.0, 2.0, 3.0)]
        [1.0, 1.1, 1.2]
    """

    def __init__(self, norms: list[float] | None = None) -> None:
        self.norms = list(norms or ())  # in ascending order

    def next(self, norm: float) -> float:
        """Add a norm and return the percentile."""
        bisect.insort(self.norms, norm)
        position = PERCENTILE / 100 * (len(self.norms) - 1)
        below = math.floor(position)
        above = min(below + 1, len(self.norms) - 1)
        return self.norms[below] + (position - below) * (self.norms[above] - self.norms[below])

    def state(self) -> dict[str, Any]:
        """All norms so far."""
        return {"norms": list(self.norms)}


class ZClip:
    """A norm that is z > 2.5 standard deviations above a moving mean is lowered to 2.5² / z deviations above it.

    From arXiv 2504.02507, section 3. Mean and variance start as those of the first 25 norms, for which there is no
    limit, and are then smoothed with factor 0.97. A norm that was clipped enters them with its clipped value.

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
        """Note a norm and return what it is lowered to; infinity if it is not lowered, as during the first 25 norms."""
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
        """The first norms, the mean and the variance."""
        return {"first": list(self.first), "mean": self.mean, "variance": self.variance}

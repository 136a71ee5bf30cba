"""How large a gradient norm may be, computed from the norms so far: AutoClip and ZClip. Plain Python."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

# The settings of the papers.
PERCENTILE = 10.0  # AutoClip
Z_THRESHOLD, SMOOTHING, WARM_UP = 2.5, 0.97, 25  # ZClip
WEIGHT_RATIO, LEAST_WEIGHT_NORM = 0.01, 1e-3  # AGC


@dataclass
class AutoClip:
    """The p-th percentile of all norms so far, the newest included (arXiv 2007.14469, equation 3; p = 10).

    Attributes:
        norms: all norms so far, in ascending order.

    Example:
        >>> clip = AutoClip()
        >>> [round(clip.next(norm), 2) for norm in (1.0, 2.0, 3.0)]
        [1.0, 1.1, 1.2]
    """

    norms: list[float] = field(default_factory=list)

    def next(self, norm: float) -> float:
        """Add a norm above 0, as it is before clipping, and return the percentile."""
        bisect.insort(self.norms, norm)
        position = PERCENTILE / 100 * (len(self.norms) - 1)
        below = math.floor(position)
        above = min(below + 1, len(self.norms) - 1)
        return self.norms[below] + (position - below) * (self.norms[above] - self.norms[below])


@dataclass
class ZClip:
    """A norm that is z > 2.5 standard deviations above a moving mean is lowered to 2.5² / z deviations above it.

    From arXiv 2504.02507, section 3. Mean and variance start as those of the first 25 norms, for which there is no
    limit, and are then smoothed with factor 0.97. A norm that was clipped enters them with its clipped value.

    Attributes:
        first: the first 25 norms.
        mean: the moving mean.
        variance: the moving variance.

    Example:
        >>> clip = ZClip()
        >>> for step in range(25):
        ...     _ = clip.next(1.0 + step % 2)
        >>> clip.next(1.5), round(clip.next(100.0), 1)
        (inf, 1.5)
    """

    first: list[float] = field(default_factory=list)
    mean: float = 0.0
    variance: float = 0.0

    def next(self, norm: float) -> float:
        """Note a norm above 0, as it is before clipping, and return what it is lowered to; infinity if it is not."""
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

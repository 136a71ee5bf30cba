"""The learning rate over a run: warm-up from above zero, then cosine decay to zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau


def warm_up_and_cosine(optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
    """A scheduler that is stepped after every step of the optimizer.

    Args:
        optimizer: its rates are those of the peak.
        warmup: the number of steps before the peak.
        steps: the number of all steps.
    """
    return LambdaLR(optimizer, partial(share_of_peak, warmup=warmup, steps=steps))


def share_of_peak(step: int, warmup: int, steps: int) -> float:
    """Which part of the peak the rate of a step is. No step is wasted at rate zero, the first and the last included.

    Example:
        >>> [round(share_of_peak(step, warmup=1, steps=4), 2) for step in range(4)]
        [0.5, 1.0, 0.75, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    gone = min(1.0, (step - warmup) / max(1, steps - warmup))
    return (1 + math.cos(math.pi * gone)) / 2


def as_configured(
    scheduler: Any, judged: Mapping[str, str], is_validated: bool, epochs: int | None = 1
) -> dict[str, Any]:
    """A scheduler as Lightning wants it: when it is stepped, and by which metric where it needs one.

    Args:
        scheduler: a scheduler that is stepped after each step, or one that waits for a metric to improve and is
            stepped after each epoch, by a metric of validation after each that validates.
            `lightning.pytorch.cli.ReduceLROnPlateau` names its metric.
        judged: the metric, without its stage, for one that names none and waits for a minimum ("min") or a maximum.
        is_validated: whether the run has validation rows, by which to judge.
        epochs: from one validation to the next; None where validation goes by steps. An epoch that ends before the
            first one is then left out, with a warning.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    default = f"val/{judged[scheduler.mode]}" if is_validated else "train/loss"
    monitor = getattr(scheduler, "monitor", default)
    frequency = epochs if epochs is not None and monitor.startswith("val/") else 1
    is_strict = epochs is not None
    return {
        "scheduler": scheduler,
        "interval": "epoch",
        "monitor": monitor,
        "frequency": frequency,
        "strict": is_strict,
    }

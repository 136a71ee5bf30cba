"""How one task does, told from its losses and gradient norms. Plain Python, no tensors."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

FIRST = 8  # losses and norms that say how a task started
WINDOW = 4  # losses that make one look
SPIKE = 100.0  # times the largest norm so far: those of a task that has learnt vary a thousandfold
REMEMBERED = 8  # norms that say how things are now
RISE = 0.1  # of the loss at the start, and
DEVIATIONS = 2.0  # of the first losses: three to four standard errors of a window's median
VANISHED = 1e-3  # of the gradient norm at the start
DRIFTED = 10.0  # times the prompt's norm at the start
ALIKE = 0.99  # mean cosine of tokens


@dataclass(frozen=True)
class Symptom:
    """What is wrong: "nonfinite", "spike" or "collapse", and in words."""

    seen: str
    detail: str


@dataclass
class Health:
    """Of one task; all of it is primitives, and goes into checkpoints.

    Attributes:
        patience: looks at a bad loss in a row that make a collapse, and steps in a row that are still no collapse,
            as they are not finite, and still a spike.
        first_losses: of the task's first steps, whose mean is its start.
        losses: since the last look.
        first_norms: of the task's first steps.
        norms: the last ones that were no spike.
        largest: of these, of all the run.
        not_finite: steps in a row.
        spikes: steps in a row.
        bad_looks: in a row.
        start: norm and token similarity of the prompt at the start.
        taken: steps that were well, since the prompt was put back.
        is_vouched_for: whether a look at this very step found nothing wrong.
    """

    patience: int
    first_losses: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first_norms: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    largest: float = 0.0
    not_finite: int = 0
    spikes: int = 0
    bad_looks: int = 0
    start: tuple[float, float] | None = None
    taken: int = 0
    is_vouched_for: bool = False

    @property
    def wants_signals(self) -> bool:
        """Whether the next step needs the prompt's norm and token similarity: the first, and those of a look."""
        return self.start is None or len(self.losses) >= WINDOW - 1

    def step(self, loss: float | None, norm: float, signals: tuple[float, float] | None) -> Symptom | None:
        """Take note of a step of the optimizer that is about to be.

        Args:
            loss: of the task's rows; None where it is not known.
            norm: of its gradient, not clipped.
            signals: norm and token similarity of the prompt, where wanted.

        Returns:
            What is wrong with it, or None.
        """
        self.is_vouched_for = False
        if self.start is None:
            self.start = signals
        if not (math.isfinite(norm) and (loss is None or math.isfinite(loss))):
            self.not_finite += 1
            said = f"loss {loss}, gradient norm {norm:.3g}"
            if self.not_finite > self.patience:
                return Symptom("collapse", f"{said}, not finite {self.not_finite} times in a row")
            return Symptom("nonfinite", said)
        self.not_finite = 0
        symptom = self._spike(norm) or (None if loss is None else self._look(loss, signals))
        self.taken += symptom is None
        return symptom

    def rewound(self) -> None:
        """Start looking anew; what the task started from stays."""
        self.losses, self.norms = [], []
        self.bad_looks = self.taken = 0

    def ends_badly(self) -> str | None:
        """At the end of training, why the prompt had better be an earlier one."""
        if self.bad_looks:
            return f"training ends while the loss is above its start, {self._start_loss:.3g}"
        return None

    def _spike(self, norm: float) -> Symptom | None:
        if len(self.first_norms) == FIRST and norm > SPIKE * self.largest:
            self.spikes += 1
            if self.spikes <= self.patience:
                return Symptom("spike", f"gradient norm {norm:.3g}, the largest so far was {self.largest:.3g}")
            # No spike any more, but how things are now; a collapse shows in the loss.
        self.spikes = 0
        self.norms = [*self.norms, norm][-REMEMBERED:]
        self.largest = max(self.largest, norm)
        if len(self.first_norms) < FIRST:
            self.first_norms.append(norm)
        return None

    def _look(self, loss: float, signals: tuple[float, float] | None) -> Symptom | None:
        if len(self.first_losses) < FIRST:
            self.first_losses.append(loss)
            return None
        self.losses.append(loss)
        if len(self.losses) < WINDOW:
            return None
        losses, self.losses = self.losses, []
        wrong = self._wrong(losses, signals)
        self.bad_looks = self.bad_looks + 1 if wrong else 0
        self.is_vouched_for = not wrong
        if wrong and self.bad_looks >= self.patience:
            return Symptom("collapse", wrong)
        return None

    @property
    def _start_loss(self) -> float:
        return statistics.fmean(self.first_losses)

    def _wrong(self, losses: list[float], signals: tuple[float, float] | None) -> str | None:
        """None while the loss is below its start: whatever else looks odd then works."""
        now, start = statistics.median(losses), self._start_loss
        if now < start:
            return None
        said = f"loss {now:.3g}, at the start {start:.3g}"
        if now > start + max(RISE * abs(start), DEVIATIONS * statistics.stdev(self.first_losses)):
            return said
        usual, first = statistics.median(self.norms), statistics.median(self.first_norms)
        if usual < VANISHED * first:
            return f"{said}, and the gradient has vanished: norm {usual:.3g}, at the start {first:.3g}"
        assert signals is not None and self.start is not None
        (norm, likeness), (first_norm, first_likeness) = signals, self.start
        if norm > DRIFTED * first_norm:
            return f"{said}, and the prompt's norm has drifted from {first_norm:.3g} to {norm:.3g}"
        if likeness > ALIKE > first_likeness:
            return f"{said}, and the prompt's tokens have become one: mean cosine {likeness:.3f}"
        return None

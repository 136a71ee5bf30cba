"""How well one task trains, judged by its losses and gradient norms. Plain Python, no tensors."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

FIRST = 8  # number of losses and of norms that describe a task's start
WINDOW = 4  # number of losses in one check
SPIKE = 100.0  # factor on the largest norm so far; it is large as the norms of a trained task vary a thousandfold
REMEMBERED = 8  # number of norms that describe the present
RISE = 0.1  # a rise of the loss is bad if it exceeds this fraction of the loss at the start and, at the same time,
DEVIATIONS = 2.0  # this many deviations of the first losses: three to four standard errors of a window's median
VANISHED = 1e-3  # fraction of the gradient norm at the start
DRIFTED = 10.0  # factor on the prompt's norm at the start
ALIKE = 0.99  # mean cosine above which tokens count as one

# A task's loss, or None; its gradient norm; and the prompt's norm and token similarity, if they are needed.
Reading = tuple[float | None, float, tuple[float, float] | None]


@dataclass(frozen=True)
class Symptom:
    """What is wrong with a task: `seen` is "nonfinite", "spike" or "collapse"; `detail` has words and numbers."""

    seen: str
    detail: str


@dataclass
class Health:
    """The health of one task. All attributes are primitives, so that checkpoints can hold them.

    A look is one check of the loss, after every `WINDOW` losses.

    Attributes:
        patience: the number of bad looks in a row that are a collapse; also the largest number of steps in a row that
            may be non-finite without a collapse, and that count as spikes.
        first_losses: the losses of the task's first steps; their mean is its start.
        losses: the losses since the last look.
        first_norms: the gradient norms of the task's first steps.
        norms: the newest gradient norms that were not spikes.
        largest: the largest gradient norm of the run that was not a spike.
        not_finite: the number of non-finite steps in a row, up to now.
        spikes: the number of spikes in a row, up to now.
        bad_looks: the number of bad looks in a row, up to now.
        start: the norm and the token similarity of the prompt at the start.
        taken: the number of steps without a symptom since the last rewind.
        is_vouched_for: whether there was a look at the current step and it found nothing wrong.
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
        """Whether the next step needs the prompt's norm and token similarity, as the first step and each look do."""
        return self.start is None or len(self.losses) >= WINDOW - 1

    def step(self, loss: float | None, norm: float, signals: tuple[float, float] | None) -> Symptom | None:
        """Note a step of the optimizer that is about to be taken, and check it.

        Args:
            loss: the loss of the task's rows; None if it is not known.
            norm: the norm of the task's gradient before clipping.
            signals: the norm and the token similarity of the prompt, if `wants_signals`.

        Returns:
            What is wrong with the task, or None.
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
        """Start over after a rewind, but keep what describes the task's start."""
        self.losses, self.norms = [], []
        self.bad_looks = self.taken = 0

    def ends_badly(self) -> str | None:
        """Why an earlier prompt is better than the one at the end of training; None if it is not."""
        if self.bad_looks:
            return f"training ends while the loss is above its start, {self._start_loss:.3g}"
        return None

    def _spike(self, norm: float) -> Symptom | None:
        if len(self.first_norms) == FIRST and norm > SPIKE * self.largest:
            self.spikes += 1
            if self.spikes <= self.patience:
                return Symptom("spike", f"gradient norm {norm:.3g}, the largest so far was {self.largest:.3g}")
            # So many large norms are no spike but the present state; if it is a collapse, the loss shows it.
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
        """What is wrong with the losses of a look, or None. A loss below its start is fine, however odd the rest is."""
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


def without_shared_blame(found: dict[str, Reading]) -> dict[str, Reading]:
    """The readings with None in place of a non-finite loss of tasks with finite gradients, if another gradient is not.

    The tasks whose gradients are not finite have then spoiled the loss of the whole batch.
    """
    if all(math.isfinite(norm) for _, norm, _ in found.values()):
        return found
    return {
        task: (None if math.isfinite(norm) and not math.isfinite(loss or 0.0) else loss, norm, wanted)
        for task, (loss, norm, wanted) in found.items()
    }

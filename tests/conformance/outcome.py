"""What was found for one type of model, in the words of the page."""

from __future__ import annotations

from dataclasses import dataclass, field

EXACT, REFUSED, FAILED, ABSENT, INLINE = "exact", "refused", "FAILED", "—", "inline"
WITHIN = "exact within its window"
PREFIX = ("prefix, training", "prefix, generation")
USUAL = (
    "logits, right", "logits, left", "loss", "gradients", "generation, left", "generation, right", "no cache",
    "static cache", "threads",
)  # fmt: skip
CHECKS = (*USUAL, *PREFIX)


@dataclass
class Outcome:
    """What was found for one type: for each check one of the four words, and the reason of what is not exact."""

    model_type: str
    model: str = ABSENT
    results: dict[str, str] = field(default_factory=lambda: dict.fromkeys(CHECKS, ABSENT))
    reason: str = ""

    def note(self, check: str, result: str, reason: str = "") -> None:
        """Keep a result, and the first reason."""
        self.results[check] = result
        self.reason = self.reason or reason

    @property
    def is_built(self) -> bool:
        """Whether transformers can build the type here."""
        return self.model != ABSENT

    @property
    def has_failed(self) -> bool:
        """Whether something is neither exact nor refused."""
        return FAILED in self.results.values()

    @property
    def in_short(self) -> str:
        """What most of the usual checks gave, and those that gave something else."""
        checks: dict[str, list[str]] = {}
        for check in USUAL:
            checks.setdefault(self.results[check], []).append(check)
        usual = EXACT if EXACT in checks else next(iter(checks))
        return "; ".join([usual, *(f"{', '.join(of)}: {each}" for each, of in checks.items() if each != usual)])

    def row(self) -> list[str]:
        """The cells of the type in the table."""
        reason = self.reason.replace("|", "/").replace("\n", " ")
        prefix = (self.results[check] for check in PREFIX)
        return [f"`{self.model_type}`", self.in_short, *prefix, self.model, reason]


class Mismatch(Exception):
    """The attached model gives something else than the row alone."""

"""What was found for one type of model, in the words of the page."""

from __future__ import annotations

from dataclasses import dataclass, field

EXACT, REFUSED, FAILED, ABSENT, INLINE = "exact", "refused", "FAILED", "—", "inline"
WITHIN = "exact within its window"
PREFIX = ("prefix, training", "prefix, generation")
CHECKS = (
    "logits, right", "logits, left", "loss", "gradients", "generation, left", "generation, right", "no cache",
    "static cache", "threads", *PREFIX,
)  # fmt: skip


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

    def row(self) -> list[str]:
        """The cells of the type in the table."""
        reason = self.reason.replace("|", "/").replace("\n", " ")
        return [f"`{self.model_type}`", self.model, *self.results.values(), reason]


class Mismatch(Exception):
    """The attached model gives something else than the row alone."""

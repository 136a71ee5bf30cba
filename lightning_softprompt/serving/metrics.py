"""Figures of a server in the text format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lightning_softprompt.serving.rows import Row

if TYPE_CHECKING:
    from lightning_softprompt.serving.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counts what a server does. Names of models are those that are served, so that clients cannot make new series.

    Args:
        engine: what runs and what waits is asked there.
    """

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        by_model = ["model"]
        self._requests = Counter(
            "softprompt_requests", "Requests by HTTP status.", ["model", "status"], registry=registry
        )
        self._prompts = Counter(
            "softprompt_prompt_tokens", "Virtual, template and text tokens.", by_model, registry=registry
        )
        self._answers = Counter("softprompt_completion_tokens", "Tokens of answers.", by_model, registry=registry)
        self._first = Histogram(
            "softprompt_first_token_seconds",
            "Time to the first token of a row.",
            by_model,
            buckets=_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "softprompt_request_seconds", "Time to the end of a request.", by_model, buckets=_SECONDS, registry=registry
        )
        for name, text, value in (
            ("softprompt_running", "Rows under way.", lambda: engine.running),
            ("softprompt_waiting", "Rows that wait for their turn.", lambda: engine.waiting),
            ("softprompt_steps", "Passes of the model so far.", lambda: engine.steps),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def count(self, model: str, status: int, rows: Sequence[Row] = (), began: float | None = None) -> None:
        """Count a request that has ended.

        Args:
            model: its model, or "" where it names none that is served.
            status: the HTTP status of its answer; 499 where the client has left.
            rows: what was answered.
            began: when it came, by `time.perf_counter()`.
        """
        self._requests.labels(model, str(status)).inc()
        if not rows or began is None:
            return
        self._prompts.labels(model).inc(sum(row.prompt_tokens for row in rows))
        self._answers.labels(model).inc(sum(row.completion_tokens for row in rows))
        self._whole.labels(model).observe(time.perf_counter() - began)
        for row in rows:
            if row.first_at is not None:
                self._first.labels(model).observe(row.first_at - began)

    def text(self) -> bytes:
        """All figures as they are now."""
        return generate_latest(self._registry)

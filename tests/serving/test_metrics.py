"""Figures as Prometheus reads them."""

from __future__ import annotations

import time
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from lightning_softprompt.inference.requests import Request
from lightning_softprompt.serving.metrics import Metrics
from lightning_softprompt.serving.rows import TextRow
from tests.serving.helpers import prompts_of


def figures(metrics: Metrics) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_requests_tokens_and_times_are_counted_by_model() -> None:
    engine = SimpleNamespace(running=3, waiting=2, steps=9)
    metrics, odd = Metrics(engine), 'of "two"\\'
    row = TextRow(Request(0, [6, 7], "tone", 9, ""), prompts_of({"tone": [5, 5, 5]}), print)
    row.completion_tokens, row.first_at = 4, time.perf_counter()
    metrics.count("tone", 200, [row], row.first_at - 0.5)
    metrics.count("tone", 200, [row], row.first_at - 0.5)
    metrics.count(odd, 499, [row], row.first_at)
    metrics.count("", 404)
    found = figures(metrics)
    assert found["softprompt_requests_total", "tone", "200"] == 2
    assert found["softprompt_requests_total", odd, "499"] == found["softprompt_requests_total", "", "404"] == 1
    assert found["softprompt_prompt_tokens_total", "tone"] == 10
    assert found["softprompt_completion_tokens_total", "tone"] == 8
    assert abs(found["softprompt_first_token_seconds_sum", "tone"] - 1.0) < 1e-6
    assert found["softprompt_request_seconds_count", "tone"] == 2
    assert [found["softprompt_" + name,] for name in ("running", "waiting", "steps")] == [3, 2, 9]
    engine.running = 0
    assert figures(metrics)["softprompt_running",] == 0


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = (Metrics(SimpleNamespace(running=0, waiting=0, steps=0)) for _ in range(2))
    first.count("tone", 200)
    assert ("softprompt_requests_total", "tone", "200") not in figures(second)

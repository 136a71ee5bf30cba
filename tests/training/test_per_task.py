"""`PerTask`: a metric of each task over interleaved rows."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import BinaryAccuracy

from lightning_softprompt import PerTask, SoftPromptError


def test_per_task_metrics_over_interleaved_rows() -> None:
    metric = PerTask(BinaryAccuracy(), ["a.b", "keys", "unused"])
    metric.update(["keys", "a.b", None, "keys"], torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 1]))
    metric.update(["keys"], torch.tensor([1]), torch.tensor([1]))
    values = metric.compute()
    assert set(values) == {"a.b", "keys"} and float(values["a.b"]) == 0
    assert float(values["keys"]) == pytest.approx(2 / 3)
    metric.reset()
    assert metric.compute() == {}
    with pytest.raises(SoftPromptError, match=r"unknown task 'x'; this metric has: 'a\.b'"):
        metric.update(["x"], torch.tensor([1]), torch.tensor([1]))
    growing = PerTask(MeanMetric())
    growing.update(["b", "a"], torch.tensor([1.0, 2.0]))
    assert growing.compute() == {"b": 1.0, "a": 2.0}


def test_rows_of_a_fit_come_behind_those_of_a_validation_in_inference_mode() -> None:
    metric = PerTask(MeanMetric(), ["a"])
    with torch.inference_mode():
        metric.update(["a"], torch.tensor([1.0]))
        metric.reset()
    with torch.no_grad():
        metric.update(["a"], torch.tensor([3.0]))
    assert metric.compute() == {"a": 3.0}

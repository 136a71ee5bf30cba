"""The rate over a run, and how schedulers of a user's own are stepped."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import SGD
from torch.optim import lr_scheduler as of_torch
from transformers import get_cosine_schedule_with_warmup

from lightning_softprompt import CausalLMModule, SoftPromptCallback, SoftPromptError, TaskDataModule, TaskTemplate
from lightning_softprompt.training.schedule import as_configured, share_of_peak, warm_up_and_cosine
from tests.modules import trainer


class Rates(Callback):
    """The rate of each step, and that behind the run."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer, *_: object) -> None:
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, *_: object) -> None:
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(base, tmp_path, scheduler: Any = None, validates: bool = True, **options: Any) -> list[float]:
    rows = [{"text": ["good", "bad"][number % 2], "label": ["good", "bad"][number % 2]} for number in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "task": "a"}) + "\n" for row in rows))
    template = TaskTemplate("{text} =>", " {label}", labels=[" good", " bad"])
    validation = str(path) if validates else None
    data = TaskDataModule(str(base), {"a": template}, train=str(path), validation=validation, batch_size=4)
    module = CausalLMModule(str(base), optimizer=lambda p: SGD(p, lr=1e-9), lr_scheduler=scheduler)
    rates = Rates()
    trainer(tmp_path, SoftPromptCallback({"a": 2}), rates, **{"max_epochs": 3, **options}).fit(module, data)
    return [rate / 1e-9 for rate in rates.found]


def test_no_step_of_a_run_has_rate_zero(tiny_base, tmp_path) -> None:
    rates = fit(tiny_base, tmp_path, max_epochs=10)
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and min(rates[:20]) > 0 and rates[20] == pytest.approx(0)
    assert len(rates) == 21 and rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.parametrize("warmup, steps", [(1, 10), (5, 50), (3, 3), (10, 4)])
def test_behind_the_warm_up_it_is_the_schedule_of_transformers(warmup: int, steps: int) -> None:
    ours, theirs = (SGD([torch.zeros(1)], lr=2.0) for _ in range(2))
    pair = warm_up_and_cosine(ours, warmup, steps), get_cosine_schedule_with_warmup(theirs, warmup, steps)
    for step in range(steps):
        found, expected = ours.param_groups[0]["lr"], theirs.param_groups[0]["lr"]
        assert found > 0 and (step < warmup or found == pytest.approx(expected))
        for optimizer, scheduler in zip((ours, theirs), pair, strict=True):
            optimizer.step()
            scheduler.step()
    assert share_of_peak(steps + 5, warmup, steps) >= 0


@pytest.mark.parametrize(
    "scheduler, is_validated, monitor",
    [
        (lambda o: ReduceLROnPlateau(o, monitor="val/f1"), True, "val/f1"),
        (lambda o: of_torch.ReduceLROnPlateau(o), True, "val/loss"),
        (lambda o: of_torch.ReduceLROnPlateau(o, mode="max"), True, "val/accuracy"),
        (lambda o: of_torch.ReduceLROnPlateau(o), False, "train/loss"),
        (lambda o: of_torch.StepLR(o, 1), True, None),
    ],
)
def test_a_scheduler_that_waits_for_a_metric_gets_one(scheduler, is_validated: bool, monitor: str | None) -> None:
    made = as_configured(scheduler(SGD([torch.zeros(1)], lr=1.0)), {"min": "loss", "max": "accuracy"}, is_validated)
    assert made.get("monitor") == monitor and made["interval"] == ("epoch" if monitor else "step")


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("validates", [True, False])
def test_a_plateau_lowers_the_rate_after_an_epoch(validates: bool, tiny_base, tmp_path) -> None:
    plateau = lambda optimizer: of_torch.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5, eps=0)  # noqa: E731
    rates = fit(tiny_base, tmp_path, plateau, validates)
    assert rates == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.25])


def test_a_plateau_is_judged_where_an_epoch_validates(tiny_base, tmp_path) -> None:
    plateau = lambda optimizer: of_torch.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5, eps=0)  # noqa: E731
    rates = fit(tiny_base, tmp_path, plateau, max_epochs=6, check_val_every_n_epoch=2)
    assert rates[::2] == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.25])
    with pytest.warns(RuntimeWarning, match="val/loss which is not available"):  # the first epoch
        rates = fit(tiny_base, tmp_path, plateau, check_val_every_n_epoch=None, val_check_interval=3)
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 0.5])


def test_a_run_without_an_end_is_told_what_to_set(tiny_base, tmp_path) -> None:
    with pytest.raises(SoftPromptError, match="set max_steps or max_epochs, or give an lr_scheduler"):
        fit(tiny_base, tmp_path, max_epochs=-1)

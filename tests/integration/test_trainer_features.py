"""What the Trainer can do, on a module that has never heard of this library: nothing of it is lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.model_summary import summarize
from torch.utils.data import DataLoader

from lightning_softprompt import (
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPrompts,
)
from tests import modules
from tests.modules import TASKS, loader, trainer
from tests.training.moved_parameters import Start, assert_exactly_the_prompts_moved


class Accurate(modules.Plain):
    """Logs an accuracy that falls, and can scale its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.epochs_seen = 2, 0

    def train_dataloader(self) -> DataLoader:
        return loader(24, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return loader(6, 3)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/accuracy", 1.0 / (1 + self.epochs_seen))
            self.epochs_seen += 1


def prompts() -> SoftPromptCallback:
    return SoftPromptCallback(dict(TASKS))


def test_lr_find_keeps_the_routing_and_puts_the_prompts_back(tmp_path) -> None:
    module, callback = Accurate(), prompts()
    module.batch_size = 1
    run = trainer(tmp_path, callback, limit_val_batches=0)
    found = Tuner(run).lr_find(module, num_training=24, early_stop_threshold=None)
    assert len(found.results["loss"]) >= 20 and module.learning_rate == found.suggestion()
    start = Start()
    as_made = SoftPrompts.for_model(modules.Plain().model, dict(TASKS))
    assert all(torch.equal(callback.prompts[task], as_made[task]) for task in TASKS)
    run.callbacks.append(start)
    run.fit(module)
    assert_exactly_the_prompts_moved(module, start)


def test_scale_batch_size_keeps_the_routing(tmp_path) -> None:
    module, start = Accurate(), Start()
    run = trainer(tmp_path, prompts(), max_epochs=1)
    assert Tuner(run).scale_batch_size(module, mode="power", steps_per_trial=1, max_trials=2) == module.batch_size == 4
    run.callbacks.append(start)
    run.fit(module)
    assert_exactly_the_prompts_moved(module, start)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule will be overridden")
@pytest.mark.parametrize(
    "options, steps",
    [
        ({"overfit_batches": 2}, 2),
        ({"limit_train_batches": 3, "limit_val_batches": 1}, 3),
        ({"limit_train_batches": 0.5}, 6),
        ({"val_check_interval": 4}, 12),
        ({"max_steps": 5, "max_epochs": -1}, 5),
        ({"profiler": "simple"}, 12),
        ({"profiler": "advanced"}, 12),
        ({"profiler": "pytorch"}, 12),
        ({"detect_anomaly": True}, 12),
        ({"inference_mode": False}, 12),
        ({"reload_dataloaders_every_n_epochs": 1}, 12),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options(options: dict[str, Any], steps: int, tmp_path) -> None:
    module, start = Accurate(), Start()
    run = trainer(tmp_path, prompts(), start, **options)
    run.fit(module)
    assert run.global_step == steps
    assert_exactly_the_prompts_moved(module, start)


def test_early_stopping_and_checkpoints_on_val_accuracy(tmp_path) -> None:
    module, callback = Accurate(), prompts()
    saving = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max", filename="best")
    stopping = EarlyStopping("val/accuracy", mode="max", patience=2)
    run = trainer(tmp_path, saving, stopping, callback, max_epochs=9, enable_checkpointing=True)
    run.fit(module)
    assert run.current_epoch == 3
    best = torch.load(saving.best_model_path, weights_only=True)
    assert best["epoch"] == 0 and len(best["state_dict"]) == len(TASKS)
    run.test(module, loader(6, 3), ckpt_path="best")
    for task in TASKS:
        assert torch.equal(callback.prompts[task], best["state_dict"][f"model.soft_prompts.prompt:{task}"])


def test_two_seeded_deterministic_runs_are_equal(tmp_path) -> None:
    found = []
    for _ in range(2):
        seed_everything(7, verbose=False)
        callback = prompts()
        trainer(tmp_path, callback, deterministic=True).fit(Accurate())
        found.append({task: callback.prompts[task].detach().clone() for task in TASKS})
    assert all(torch.equal(found[0][task], found[1][task]) for task in TASKS)
    torch.use_deterministic_algorithms(False)


def test_the_summary_counts_the_prompts_as_trainable(tmp_path) -> None:
    module = Accurate()
    trainer(tmp_path, prompts(), ModelSummary(max_depth=2), enable_model_summary=True, fast_dev_run=True).fit(module)
    summary = summarize(module)
    assert summary.trainable_parameters == sum(TASKS.values()) * 32
    assert summary.total_parameters > 20 * summary.trainable_parameters


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, StochasticWeightAveraging])
def test_averaged_prompts_are_means_of_prompts(averaging: type, tmp_path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.values: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer, pl_module, *_: object) -> None:
            self.values.append(pl_module.model.soft_prompts["alpha"].detach().clone())

    options = {"swa_lrs": 0.1} if averaging is StochasticWeightAveraging else {}
    finals = []
    for first in (True, False):
        callbacks = [prompts(), averaging(**options)]
        trainer(tmp_path, *(callbacks if first else callbacks[::-1]), seen := Seen(), max_epochs=3).fit(
            module := Accurate()
        )
        finals.append(module.model.soft_prompts["alpha"].detach())
    final, other = finals
    assert torch.equal(final, other)
    low, high = torch.stack(seen.values).amin(0), torch.stack(seen.values).amax(0)
    assert not torch.equal(final, seen.values[-1]) or averaging is StochasticWeightAveraging
    assert bool(((final >= low - 1e-5) & (final <= high + 1e-5)).all())


def test_manual_optimization_with_two_optimizers(tmp_path) -> None:
    class Manual(modules.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.head = torch.nn.Linear(61, 1)

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            out = self.model(**batch)
            self.manual_backward(out.loss + self.head(out.logits).square().mean())
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.model.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)]

    module, start = Manual(), Start()
    run = trainer(tmp_path, prompts(), start)
    run.fit(module, loader())
    assert_exactly_the_prompts_moved(module, start)
    assert len(run.optimizers[0].param_groups[0]["params"]) == len(TASKS)


def test_callbacks_in_any_order(tmp_path) -> None:
    ends = []
    for order in itertools.permutations(range(4)):
        made = [prompts(), PromptGradientNorm(), CollapseGuard(), PromptGradientClipping()]
        module = modules.Plain()
        trainer(tmp_path, *(made[place] for place in order), limit_train_batches=2).fit(module, loader())
        ends.append(module.model.soft_prompts["beta"].detach().clone())
    assert all(torch.equal(end, ends[0]) for end in ends)

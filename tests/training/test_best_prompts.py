"""`BestPrompts`: each task ends with the prompt of its own best validation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_softprompt import BestPrompts, SoftPromptCallback, SoftPromptError
from lightning_softprompt.training.best_prompts import prompts_of
from tests.modules import TASKS, Plain, loader, trainer

SCRIPT: dict[str, list[float]] = {
    "alpha": [3.0, 1.0, 2.0, 4.0],
    "beta": [4.0, 3.0, 2.0, 1.0],
    "gamma": [float("nan"), 5.0, 5.0, float("inf")],
}


class Scripted(Plain):
    """Validations say what the script says, one after another."""

    def on_fit_start(self) -> None:
        self.validations = getattr(self, "validations", -1)  # the sanity check is the first

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        place = max(self.validations, 0)
        self.log_dict({f"val/loss/{task}": values[place] for task, values in SCRIPT.items()})
        self.log_dict({f"val/accuracy/{task}": -values[place] for task, values in SCRIPT.items()})
        self.validations += 1


class Seen(Callback):
    """The prompts at each validation, and its step."""

    def __init__(self) -> None:
        self.values: list[tuple[int, dict[str, Tensor]]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            prompts = trainer.callbacks[0].prompts
            now = {task: prompts[task].detach().clone() for task in prompts}
            self.values.append((trainer.global_step, now))


def run(folder: Any, best: BestPrompts, epochs: int = 4, module: Plain | None = None) -> tuple[Any, Seen]:
    seen, callback = Seen(), SoftPromptCallback(tasks=TASKS)
    fitted = trainer(folder, callback, best, seen, max_epochs=epochs, num_sanity_val_steps=1)
    fitted.fit(Scripted() if module is None else module, loader(), loader())
    return fitted, seen


@pytest.mark.parametrize("monitors", [{"val/loss": "min"}, {"val/accuracy": "max"}, None])
def test_each_task_ends_with_the_prompt_of_its_own_best_validation(tmp_path: Any, monitors: Any) -> None:
    best = BestPrompts(monitors)
    fitted, seen = run(tmp_path, best)
    prompts = fitted.callbacks[0].prompts
    for task, place in (("alpha", 1), ("beta", 3), ("gamma", 1)):  # NaN and Inf never count, nor what is as good
        step, values = seen.values[place]
        assert torch.equal(prompts[task], values[task]), task
        assert best.best[task].step == step
        assert best.best[task].metrics[f"val/loss/{task}"] == SCRIPT[task][place]
        assert set(best.best[task].metrics) == {f"val/accuracy/{task}", f"val/loss/{task}"}
    assert not torch.equal(prompts["alpha"], seen.values[3][1]["alpha"])


def test_the_next_metric_decides_where_the_first_is_equal_or_missing() -> None:
    best = BestPrompts({"val/accuracy": "max", "val/loss": "min"})
    prompts = {"label": torch.zeros(1, 2), "free": torch.zeros(1, 2)}
    steps = [
        {"val/accuracy/label": 0.5, "val/loss/label": 1.0, "val/loss/free": 3.0},
        {"val/accuracy/label": 0.4, "val/loss/label": 0.1, "val/loss/free": 2.0},
        {"val/accuracy/label": 0.5, "val/loss/label": 0.9, "val/loss/free": 4.0},
        {"val/accuracy/label": 0.5, "val/loss/label": 0.9, "val/loss/free": 2.0},
    ]
    for step, metrics in enumerate(steps):
        best.consider(prompts, metrics, step)
    assert (best.best["label"].step, best.best["free"].step) == (2, 1)


def test_a_start_that_was_considered_is_kept_if_nothing_is_better(tmp_path: Any) -> None:
    class Considered(BestPrompts):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.consider(prompts_of(pl_module), {"val/loss/alpha": 0.5, "val/loss/beta": torch.tensor(9.0)}, 0)

    best = Considered({"val/loss": "min"})
    fitted, seen = run(tmp_path, best)
    assert (best.best["alpha"].step, best.best["beta"].step) == (0, seen.values[3][0])
    assert not any(torch.equal(fitted.callbacks[0].prompts["alpha"], values["alpha"]) for _, values in seen.values)


def test_a_run_that_goes_on_knows_what_was_best(tmp_path: Any) -> None:
    module = Scripted()
    first, seen = run(tmp_path, BestPrompts(), epochs=2, module=module)
    assert first.callbacks[1].validated == seen.values[1][0]
    first.save_checkpoint(tmp_path / "run.ckpt")
    again, best = Scripted(), BestPrompts()
    again.validations = 2
    callback = SoftPromptCallback(tasks=TASKS)
    trainer(tmp_path, callback, best, max_epochs=4, num_sanity_val_steps=0).fit(
        again, loader(), loader(), ckpt_path=tmp_path / "run.ckpt"
    )
    assert callback.prompts is not None
    assert torch.equal(callback.prompts["alpha"], seen.values[1][1]["alpha"])


def test_without_validation_and_outside_of_fit_nothing_changes(tmp_path: Any) -> None:
    best, callback = BestPrompts(), SoftPromptCallback(tasks=TASKS)
    fitted = trainer(tmp_path, callback, best)
    module = Scripted()
    fitted.fit(module, loader())
    assert not best.best
    fitted.validate(module, loader(), verbose=False)
    assert not best.best


def test_a_callback_for_several_modules_starts_anew_with_each(tmp_path: Any) -> None:
    best, callback = BestPrompts(), SoftPromptCallback(tasks=TASKS)
    for fold in range(2):
        seen, module = Seen(), Scripted()
        fitted = trainer(tmp_path, callback, best, seen, max_epochs=2, num_sanity_val_steps=1)
        fitted.fit(module, loader(24 + 12 * fold), loader())
        assert callback.prompts is not None
        assert torch.equal(callback.prompts["beta"], seen.values[1][1]["beta"]), fold


def test_what_is_kept_are_the_weights_that_were_validated(tmp_path: Any) -> None:
    class Validated(Callback):
        def __init__(self) -> None:
            self.values: list[dict[str, Tensor]] = []

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            self.values.append(prompts_of(pl_module))

    averaging = EMAWeightAveraging(decay=0.5)
    best, seen, callback = BestPrompts(), Validated(), SoftPromptCallback(tasks=TASKS)
    fitted = trainer(tmp_path, callback, averaging, best, seen, max_epochs=2, num_sanity_val_steps=0)
    fitted.fit(Scripted(), loader(), loader())
    assert callback.prompts is not None
    assert torch.equal(callback.prompts["beta"], seen.values[0]["beta"])  # 4.0, then the sanity check is not counted
    assert best.best["beta"].step == 3


def test_a_loader_without_batches_hides_no_other_one(tmp_path: Any) -> None:
    class Several(Scripted):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    best, callback = BestPrompts(), SoftPromptCallback(tasks=TASKS)
    fitted = trainer(tmp_path, callback, best, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="is zero"):
        fitted.fit(Several(), loader(), [DataLoader([]), loader()])
    assert set(best.best) == {"alpha", "beta"}  # gamma's loss is no number


def test_what_was_validated_before_the_first_step_alone_is_not_put_back(tmp_path: Any) -> None:
    class Considered(BestPrompts):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.consider(prompts_of(pl_module), {"val/loss/alpha": 0.5}, 0)

    callback, best = SoftPromptCallback(tasks=TASKS), Considered()
    fitted = trainer(tmp_path, callback, best, max_steps=2)
    fitted.fit(Scripted(), loader())
    assert callback.prompts is not None and best.best["alpha"].step == 0
    assert not torch.equal(callback.prompts["alpha"], best.best["alpha"].prompt)


def test_a_metric_that_is_never_logged_is_told(tmp_path: Any, caplog: Any) -> None:
    run(tmp_path, BestPrompts({"val/f1": "max", "val/bleu": "max"}), epochs=1)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "lightning_softprompt"]
    assert said.startswith("no validation logged a finite val/f1/<task> or val/bleu/<task>, so that each task keeps")
    caplog.clear()
    run(tmp_path, BestPrompts({"val/loss": "min"}), epochs=1)
    trainer(tmp_path, SoftPromptCallback(tasks=TASKS), BestPrompts({"val/f1": "max"})).fit(Scripted(), loader())
    assert not [record for record in caplog.records if record.name == "lightning_softprompt"]


def test_another_mode_is_refused_and_no_metric() -> None:
    with pytest.raises(SoftPromptError, match="the mode of a metric must be one of"):
        BestPrompts({"val/loss": "least"})  # type: ignore[dict-item]
    with pytest.raises(SoftPromptError, match="at least one metric"):
        BestPrompts({})

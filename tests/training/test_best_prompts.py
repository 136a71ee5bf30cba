"""`BestPrompts`: each task ends with the prompt of its own best validation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_softprompt import BestPrompts, SoftPromptCallback, SoftPromptError
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


@pytest.mark.parametrize(("monitor", "mode"), [("val/loss", "min"), ("val/accuracy", "max")])
def test_each_task_ends_with_the_prompt_of_its_own_best_validation(tmp_path: Any, monitor: str, mode: Any) -> None:
    best = BestPrompts(monitor, mode)
    fitted, seen = run(tmp_path, best)
    prompts = fitted.callbacks[0].prompts
    for task, place in (("alpha", 1), ("beta", 3), ("gamma", 2)):  # as good as before counts, NaN and Inf never do
        step, values = seen.values[place]
        assert torch.equal(prompts[task], values[task]), task
        assert best.best[task].step == step
        assert best.best[task].metrics[f"val/loss/{task}"] == SCRIPT[task][place]
        assert set(best.best[task].metrics) == {f"val/accuracy/{task}", f"val/loss/{task}"}
    assert not torch.equal(prompts["alpha"], seen.values[3][1]["alpha"])


def test_a_start_that_was_considered_is_kept_if_nothing_is_better(tmp_path: Any) -> None:
    class Considered(BestPrompts):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.consider(trainer.callbacks[0].prompts, {"val/loss/alpha": 0.5, "val/loss/beta": torch.tensor(9.0)}, 0)

    best = Considered()
    fitted, seen = run(tmp_path, best)
    assert (best.best["alpha"].step, best.best["beta"].step) == (0, seen.values[3][0])
    assert not any(torch.equal(fitted.callbacks[0].prompts["alpha"], values["alpha"]) for _, values in seen.values)


def test_a_run_that_goes_on_knows_what_was_best(tmp_path: Any) -> None:
    module = Scripted()
    first, seen = run(tmp_path, BestPrompts(), epochs=2, module=module)
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


def test_another_mode_is_refused() -> None:
    with pytest.raises(SoftPromptError, match="mode must be one of"):
        BestPrompts(mode="least")  # type: ignore[arg-type]

"""What holds for the gradient callbacks together: their order, what they refuse, and how they resume."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner

from lightning_softprompt import (
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPromptError,
    SoftPrompts,
)
from tests import modules, tiny
from tests.gradients.recorded_runs import Recorder, Weighted, norm_of, run
from tests.modules import TASKS, loader, trainer


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_stages_keep_their_order_whatever_the_list(order: tuple[int, ...], tmp_path) -> None:
    stages = [SoftPromptCallback(dict(TASKS)), PromptGradientNorm(1), CollapseGuard(), PromptGradientClipping(1e-2)]
    recorder = Recorder()
    torch.manual_seed(0)
    run_of = trainer(tmp_path, *(stages[index] for index in order), recorder)
    run_of.fit(Weighted({(1, "beta"): math.nan}), loader(24, 6))
    assert [type(callback) for callback in run_of.callbacks if callback in stages] == [type(stage) for stage in stages]
    assert stages[2].events and math.isnan(dict(stages[1].history["grad_norm/beta"])[1])
    assert "beta" not in recorder.clipped[1]
    assert norm_of(recorder.clipped[1]["alpha"]) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_averaged_weights_hold_the_prompts_whatever_the_list(order: tuple[int, ...], tmp_path) -> None:
    callbacks = [SoftPromptCallback(dict(TASKS)), PromptGradientNorm(1), EMAWeightAveraging(decay=0.5)]
    module, plain = modules.Plain(), modules.Plain()
    trainer(tmp_path, *(callbacks[index] for index in order)).fit(module, loader(), loader(6, 3))
    trainer(tmp_path, SoftPromptCallback(dict(TASKS)), EMAWeightAveraging(decay=0.5)).fit(plain, loader())
    assert all(torch.equal(module.model.soft_prompts[task], plain.model.soft_prompts[task]) for task in TASKS)


def test_other_prompts_start_anew_and_the_same_go_on(tmp_path) -> None:
    def fit(prompts: SoftPrompts, stages: list[Callback], checkpoint: str | None = None, epochs: int = 1) -> Trainer:
        torch.manual_seed(0)
        this = trainer(tmp_path, SoftPromptCallback(prompts), *stages, max_epochs=epochs)
        this.fit(Weighted({(2, "beta"): math.nan}), loader(24, 6), ckpt_path=checkpoint, weights_only=True)
        return this

    def prompts(seed: int = 0) -> SoftPrompts:
        return SoftPrompts.for_model(tiny.tiny_model("llama"), TASKS, seed=seed)

    def made() -> list[Callback]:
        return [PromptGradientNorm(1), CollapseGuard(), PromptGradientClipping(method="percentile")]

    def states(stages: list[Callback]) -> str:
        return repr([stage.state_dict() for stage in stages])

    stages, fresh, first = made(), made(), prompts()
    fit(first, stages).save_checkpoint(tmp_path / "run.ckpt")
    fit(prompts(seed=1), stages)  # the next fold
    fit(prompts(seed=1), fresh)
    assert states(stages) == states(fresh) and len(stages[1].events) == 1
    fit(first, stages, str(tmp_path / "run.ckpt"), epochs=2)  # a checkpoint says what was seen, whoever came between
    again = made()
    fit(prompts(), again, str(tmp_path / "run.ckpt"), epochs=2)
    assert states(stages) == states(again) and len(stages[0].history["grad_norm/total"]) == 8
    fit(first, stages)
    assert len(stages[1].events) == 2 and len(stages[0].history["grad_norm/total"]) == 12


def test_an_optimizer_that_hides_its_gradients_is_refused(tmp_path) -> None:
    class Fused(Weighted):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), fused=True)

    for callback in (PromptGradientClipping(), CollapseGuard()):
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        with pytest.raises(SoftPromptError, match="fused=False"):
            run(tmp_path, Fused(), callback, plugins=[plugin])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PromptGradientClipping(0), "above 0"),
        (lambda: PromptGradientClipping(method="norms"), "'norm', 'normalized', 'value'"),
        (lambda: PromptGradientClipping(scope="tasks"), "'task', 'global', 'token'"),
        (lambda: PromptGradientNorm(0), "at least 1"),
        (lambda: CollapseGuard(on_collapse="skip"), "'warn', 'rewind', 'stop'"),
        (lambda: CollapseGuard(on_spike="clip"), "on_spike must be one of"),
        (lambda: CollapseGuard(patience=0), "patience must be at least 1"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make, message: str) -> None:
    with pytest.raises(SoftPromptError, match=message):
        make()


def test_a_callback_without_prompts_says_so(tmp_path) -> None:
    for callback in (PromptGradientClipping(), CollapseGuard(), PromptGradientNorm()):
        with pytest.raises(SoftPromptError, match="add SoftPromptCallback"):
            trainer(tmp_path, callback).fit(modules.Plain(), loader())


def test_everything_goes_on_after_a_resume_as_if_there_had_been_none(tmp_path) -> None:
    weights = {(3, "beta"): math.nan, **{(step, "gamma"): 5.0 for step in range(12, 400)}}

    def callbacks() -> tuple[Callback, ...]:
        return (
            PromptGradientNorm(2),
            CollapseGuard(snapshot_every_n_steps=4, on_spike="warn"),
            PromptGradientClipping(method="percentile"),
        )

    def fit(epochs: int, checkpoint: str | None = None) -> tuple[Trainer, tuple[Callback, ...], Weighted]:
        torch.manual_seed(0)
        stages, module = callbacks(), Weighted(weights)
        saving = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        options = dict(max_epochs=epochs, enable_checkpointing=True)
        this = trainer(tmp_path, SoftPromptCallback(dict(TASKS)), *stages, saving, **options)
        this.fit(module, loader(6 * 10, 6), ckpt_path=checkpoint, weights_only=True)
        return this, stages, module

    _, whole, module = fit(4)
    fit(2)
    _, resumed, other = fit(4, str(tmp_path / "2" / "last.ckpt"))
    assert any(event.seen == "collapse" for event in whole[1].events)
    assert resumed[1].events == whole[1].events
    assert repr(resumed[0].history) == repr(whole[0].history)  # one is not a number, and equal to nothing
    assert resumed[2].state_dict() == whole[2].state_dict()
    for task in TASKS:
        assert torch.equal(module.model.soft_prompts[task], other.model.soft_prompts[task]), task


def test_the_learning_rate_finder_works_with_mixed_tasks(tmp_path) -> None:
    stages = [SoftPromptCallback(dict(TASKS)), PromptGradientNorm(1), CollapseGuard(), PromptGradientClipping()]
    module = modules.Plain()
    this = trainer(tmp_path, *stages, max_epochs=2)
    finder = Tuner(this).lr_find(module, loader(24), num_training=12, early_stop_threshold=None)
    assert finder is not None and finder.suggestion(skip_begin=1, skip_end=1) and len(finder.results["lr"]) >= 12
    fresh = SoftPrompts.for_model(tiny.tiny_model("llama"), TASKS)
    for task in TASKS:
        assert torch.equal(module.model.soft_prompts[task].cpu(), fresh[task])  # put back
    this.fit(module, loader(24))
    assert stages[1].history and all(not torch.equal(module.model.soft_prompts[task], fresh[task]) for task in TASKS)


def test_ranks_decide_alike(tmp_path) -> None:
    """Two processes whose rows are of different tasks; one task is spoiled on one rank."""
    command = [sys.executable, "-m", "tests.integration.two_processes", str(tmp_path)]
    subprocess.run(command, check=True, timeout=240, capture_output=True, text=True)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["events"] == other["events"] == [(2, "beta", "nonfinite", "skip")]
    for task in TASKS:
        assert torch.equal(one["prompts"][task], other["prompts"][task])
        assert one["norms"][task] == other["norms"][task]
        assert all(norm <= 1e-2 * (1 + 1e-5) for norm in one["clipped"][task])
    assert one["limits"] == other["limits"] and one["limits"]
    assert one["losses"] == other["losses"] and one["losses"]["beta"]

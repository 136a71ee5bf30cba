"""Checkpoints: prompts and their optimizer state alone, exact resume, and errors that name the prompt."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

from lightning_softprompt import SoftPromptCallback, SoftPromptError, SoftPrompts, TaskTemplate, attach, detach
from tests import modules
from tests.modules import TASKS, loader, trainer


def fit(folder, tasks=TASKS, make=modules.Plain, *, checkpoint=None, weights_only=False, **options):
    seed_everything(0, verbose=False)
    module, callback = make(), SoftPromptCallback(tasks)
    saving = ModelCheckpoint(
        folder, filename="{epoch}-{step}", save_top_k=-1, save_weights_only=weights_only, save_last=True
    )
    run = trainer(folder, callback, saving, enable_checkpointing=True, **options)
    run.fit(module, loader(), ckpt_path=checkpoint)
    return module, callback, run


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("make", [modules.Plain, modules.BuiltLate, modules.GroupsWithScheduler])
def test_a_checkpoint_holds_the_prompts_alone(weights_only: bool, make, tmp_path) -> None:
    _, callback, _ = fit(tmp_path, make=make, weights_only=weights_only)
    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    expected = {f"model.soft_prompts.prompt:{task}" for task in TASKS}
    if make is modules.GroupsWithScheduler:
        expected |= {"head.weight", "head.bias"}
    assert set(checkpoint["state_dict"]) == expected
    for task in TASKS:
        assert torch.equal(checkpoint["state_dict"][f"model.soft_prompts.prompt:{task}"], callback.prompts[task])
    assert path.stat().st_size < 40_000
    assert ("optimizer_states" in checkpoint) == (not weights_only)
    if not weights_only:
        assert len(checkpoint["optimizer_states"][0]["state"]) == len(expected)


@pytest.mark.parametrize("make", [modules.Plain, modules.BuiltLate, modules.GroupsWithScheduler, modules.OverTheModel])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_resumed_run_is_bit_identical(make, precision: str, tmp_path) -> None:
    whole, expected, _ = fit(tmp_path / "whole", make=make, max_epochs=3, precision=precision)
    fit(tmp_path / "first", make=make, max_epochs=2, precision=precision)
    # The order of tasks means nothing: they are matched by name.
    tasks = dict(reversed(TASKS.items()))

    class Routed(make):
        def training_step(self, batch, batch_idx):
            batch["tasks"] = [list(TASKS)[i] for i in batch.pop("task_ids").tolist()]
            return super().training_step(batch, batch_idx)

    resumed, found, run = fit(
        tmp_path / "second",
        tasks,
        Routed,
        checkpoint=tmp_path / "first" / "last.ckpt",
        max_epochs=3,
        precision=precision,
    )
    assert run.global_step == 9
    for task in TASKS:
        assert torch.equal(found.prompts[task], expected.prompts[task])
        states = [m.trainer.optimizers[0].state[c.prompts[task]] for m, c in ((whole, expected), (resumed, found))]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_best_checkpoint_is_loaded(tmp_path) -> None:
    module, callback = modules.Plain(), SoftPromptCallback(TASKS)
    saving = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    run = trainer(tmp_path, callback, saving, enable_checkpointing=True, max_epochs=3)
    run.fit(module, loader(), loader(6))
    final = modules.snapshot({task: callback.prompts[task] for task in TASKS})
    best = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    score = run.test(module, loader(6), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert score == pytest.approx(float(saving.best_model_score), rel=1e-6)
    for task in TASKS:
        assert torch.equal(callback.prompts[task], best[f"model.soft_prompts.prompt:{task}"])
        assert not torch.equal(callback.prompts[task], final[task])
    fresh = trainer(tmp_path, SoftPromptCallback(TASKS))
    again = fresh.test(modules.BuiltLate(), loader(6), ckpt_path=saving.best_model_path, verbose=False)
    assert again[0]["test_loss"] == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({**TASKS, "delta": 3}, "no prompt of task 'delta'; it holds prompts of: 'alpha', 'beta', 'gamma'"),
        ({**TASKS, "delta": 3}, r"leave ckpt_path out and start each old task with Prompt\(task, path\)"),
        ({**TASKS, "beta": 3}, r"prompt of task 'beta' has shape \[7, 32\], this run's \[3, 32\]"),
        ({"alpha": 4, "beta": 7}, "has a prompt of task 'gamma', which this run does not"),
    ],
    ids=["missing", "what to do", "shape", "unknown"],
)
def test_another_set_of_prompts_fails_and_is_named(tasks: dict, message: str, tmp_path) -> None:
    fit(tmp_path)
    run = trainer(tmp_path, SoftPromptCallback(tasks))
    with pytest.raises(SoftPromptError, match=message):
        run.validate(modules.Plain(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_a_missing_trained_parameter_outside_the_base_still_fails(tmp_path) -> None:
    fit(tmp_path)
    run = trainer(tmp_path, SoftPromptCallback(TASKS))
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        run.validate(modules.GroupsWithScheduler(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_a_run_with_weight_averaging_resumes(tmp_path) -> None:
    def average(folder, checkpoint=None, epochs=2):
        seed_everything(0, verbose=False)
        module, callback = modules.Plain(), SoftPromptCallback(TASKS)
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        run = trainer(folder, callback, EMAWeightAveraging(), saving, enable_checkpointing=True, max_epochs=epochs)
        run.fit(module, loader(), ckpt_path=checkpoint)
        return callback.prompts

    expected = average(tmp_path / "whole")
    found = average(tmp_path / "more", tmp_path / "whole" / "epoch=0.ckpt")
    for task in TASKS:
        assert torch.equal(found[task], expected[task])


def test_an_alias_of_the_base_is_left_out_of_checkpoints_too(tmp_path) -> None:
    class Aliased(modules.Plain):
        def __init__(self):
            super().__init__()
            self.backbone = self.model.model

    module = Aliased()
    trainer(tmp_path, SoftPromptCallback(TASKS)).fit(module, loader())
    assert set(module.state_dict()) == {f"model.soft_prompts.prompt:{task}" for task in TASKS}
    module.load_state_dict(module.state_dict())


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("make", [modules.Plain, modules.BuiltLate])
def test_the_prompts_come_back_from_a_checkpoint_alone(weights_only: bool, make, tmp_path) -> None:
    class Template(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            prompts = pl_module.model.soft_prompts
            prompts.templates["beta"] = TaskTemplate("{text} =>", "{label}", labels=["good", "bad"], end_token=True)
            prompts.freeze("gamma")

    module, callback = make(), SoftPromptCallback(dict(reversed(TASKS.items())))
    saving = ModelCheckpoint(tmp_path, filename="saved", save_weights_only=weights_only)
    run = trainer(tmp_path, callback, Template(), saving, enable_checkpointing=True)
    run.fit(module, loader(names=True, key="tasks"))
    run.save_checkpoint(tmp_path / "by-hand.ckpt", weights_only=weights_only)
    for name in ("saved.ckpt", "by-hand.ckpt"):
        assert_equal(SoftPrompts.from_checkpoint(tmp_path / name), callback.prompts)
    assert ("optimizer_states" in torch.load(tmp_path / "saved.ckpt", weights_only=True)) == (not weights_only)


def assert_equal(found: SoftPrompts, expected: SoftPrompts) -> None:
    assert found.tasks == expected.tasks and found.base == expected.base and found.starts == expected.starts
    assert found.templates == expected.templates
    for task in expected:
        assert torch.equal(found[task], expected[task]) and found[task].requires_grad == expected[task].requires_grad


def test_a_hook_of_the_module_still_adds_to_its_checkpoints(tmp_path) -> None:
    class Adds(modules.Plain):
        def on_save_checkpoint(self, checkpoint) -> None:
            checkpoint["mine"] = 7

    _, callback, run = fit(tmp_path, make=Adds)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["mine"] == 7
    assert_equal(SoftPrompts.from_checkpoint(tmp_path / "last.ckpt"), callback.prompts)
    detach(run.lightning_module.model)
    run.save_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(SoftPromptError, match=r"bare\.ckpt holds no soft prompts"):
        SoftPrompts.from_checkpoint(tmp_path / "bare.ckpt")


def test_a_module_of_ones_own_takes_them_by_attach(tmp_path) -> None:
    """As docs/resuming.md has it: the rest of the module without the base, then the prompts."""
    trained, callback, _ = fit(tmp_path, make=modules.GroupsWithScheduler)
    with pytest.warns(UserWarning, match="Found keys that are"):
        module = modules.GroupsWithScheduler.load_from_checkpoint(tmp_path / "last.ckpt", strict=False)
    attach(module.model, SoftPrompts.from_checkpoint(tmp_path / "last.ckpt"))
    assert torch.equal(module.head.weight, trained.head.weight)
    batch = modules.Rows(3).collate(list(modules.Rows(3)))
    with torch.no_grad():
        torch.testing.assert_close(module.model(**batch).logits, trained.model(**batch).logits)
    assert module.model.soft_prompts.tasks == callback.prompts.tasks


def test_a_run_that_froze_other_tasks_is_told_before_it_goes_on(tmp_path) -> None:
    class Unfreezes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            pl_module.model.soft_prompts.unfreeze("alpha")

    def callback() -> SoftPromptCallback:
        prompts = SoftPrompts.for_model(modules.Plain().model, TASKS)
        prompts.freeze("alpha")
        return SoftPromptCallback(prompts)

    run = trainer(tmp_path, callback(), Unfreezes())
    run.fit(modules.Plain(), loader())
    run.save_checkpoint(path := tmp_path / "run.ckpt")
    message = r"have \[\[3\]\] parameters, those of this run \[\[2\]\].*; frozen tasks here: 'alpha'. Freeze before fit"
    with pytest.raises(SoftPromptError, match=message):
        trainer(tmp_path, callback(), max_epochs=2).fit(modules.Plain(), loader(), ckpt_path=path)
    again = SoftPromptCallback(SoftPrompts.from_checkpoint(path))
    trainer(tmp_path, again, max_epochs=2).fit(modules.Plain(), loader(), ckpt_path=path)
    trainer(tmp_path, callback()).validate(modules.Plain(), loader(), ckpt_path=path, verbose=False)

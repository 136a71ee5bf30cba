"""The callback on LightningModules that have never heard of this library."""

from __future__ import annotations

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI

from lightning_softprompt import SoftPromptCallback, SoftPromptError, SoftPrompts
from tests import modules, tiny
from tests.modules import TASKS, Plain, loader, trainer
from tests.training.moved_parameters import Start, assert_exactly_the_prompts_moved


def test_every_forward_of_the_base_runs_in_eval_mode(tmp_path) -> None:
    module = modules.Plain()
    module.model.train()
    modes = []
    module.model.model.register_forward_hook(lambda m, *_: modes.append(any(c.training for c in m.modules())))
    trainer(tmp_path, SoftPromptCallback(TASKS)).fit(module.train(), loader())
    assert modes and not any(modes)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"fast_dev_run": True},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 1.0},
    ],
    ids=str,
)
def test_trainer_options(options: dict, tmp_path) -> None:
    module, start = modules.Plain(), Start()
    trainer(tmp_path, SoftPromptCallback(TASKS), start, **options).fit(module, loader(), loader())
    assert_exactly_the_prompts_moved(module, start)


def test_bf16_true_keeps_prompts_float32(tmp_path) -> None:
    module = modules.Plain()
    callback = SoftPromptCallback(TASKS)
    trainer(tmp_path, callback, precision="bf16-true").fit(module, loader())
    assert module.model.dtype == torch.bfloat16
    assert all(callback.prompts[task].dtype == torch.float32 for task in TASKS)


def test_lightning_cli_with_optimizer(tmp_path, monkeypatch) -> None:
    class Module(modules.Plain):
        configure_optimizers = LightningModule.configure_optimizers

        def train_dataloader(self):
            return loader()

    monkeypatch.chdir(tmp_path)
    start, callback = Start(), SoftPromptCallback(TASKS)
    cli = LightningCLI(
        Module,
        run=False,
        save_config_callback=None,
        trainer_defaults=dict(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            accelerator="cpu",
        ),
        args=[
            "--seed_everything=0",
            "--optimizer=AdamW",
            "--optimizer.lr=0.1",
            "--lr_scheduler=ExponentialLR",
            "--lr_scheduler.gamma=0.9",
        ],
    )
    cli.trainer.callbacks.extend([callback, start])
    cli.trainer.fit(cli.model)
    assert_exactly_the_prompts_moved(cli.model, start)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_task_without_rows_does_not_move(accumulate: int, optimizer: str, tmp_path) -> None:
    """Rows of alpha and gamma come in the first two batches alone; momentum and decay would move them after that."""

    class Module(modules.Plain):
        def configure_optimizers(self):
            if optimizer == "adamw":
                return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)  # zeros are gradients too, to momentum

    history = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            history.append(modules.snapshot({task: callback.prompts[task] for task in TASKS}))

    first, second = modules.Rows(4, tasks=(0, 2)), modules.Rows(8, tasks=(1,))
    rows = [*(first[i] for i in range(4)), *(second[i] for i in range(8))]
    data = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=first.collate)
    callback = SoftPromptCallback(TASKS)
    trainer(tmp_path, callback, Watch(), accumulate_grad_batches=accumulate).fit(Module(), data)
    before, after = history[1], history[-1]
    assert torch.equal(before["alpha"], after["alpha"]) and torch.equal(before["gamma"], after["gamma"])
    assert not torch.equal(before["beta"], after["beta"])
    if accumulate == 2:
        # A task with rows in one micro-batch of the two moves.
        assert not torch.equal(history[0]["alpha"], history[1]["alpha"])


def test_a_prompt_outside_the_optimizer_is_an_error_at_fit_start(tmp_path) -> None:
    class NoOptimizer(modules.Plain):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="configure_optimizers"),
        pytest.raises(
            SoftPromptError,
            match="no optimizer trains the prompts of 'alpha', 'beta', 'gamma'; return an optimizer",
        ),
    ):
        trainer(tmp_path, SoftPromptCallback(TASKS)).fit(NoOptimizer(), loader())


def test_several_tasks_without_routing_are_an_error_that_says_how(tmp_path) -> None:
    with pytest.raises(SoftPromptError, match="put 'task_ids' or 'tasks' into the batch"):
        trainer(tmp_path, SoftPromptCallback(TASKS)).fit(modules.OwnLoss(), loader(key="kind"))


def test_one_task_takes_every_row(tmp_path) -> None:
    class Module(modules.Plain):
        def training_step(self, batch, batch_idx):
            batch.pop("kind")
            return self.model(**batch).loss

    module, start = Module(), Start()
    trainer(tmp_path, SoftPromptCallback({"only": 3}), start).fit(module, loader(key="kind"))
    assert_exactly_the_prompts_moved(module, start, tasks=("only",))


def test_frozen_tasks_and_given_prompts(tmp_path) -> None:
    module, start = modules.Plain(), Start()
    prompts = SoftPrompts.for_model(module.model, TASKS)
    prompts.freeze("beta")
    callback = SoftPromptCallback(prompts)
    trainer(tmp_path, callback, start).fit(module, loader())
    assert callback.prompts is prompts
    assert_exactly_the_prompts_moved(module, start, tasks=("alpha", "gamma"))
    prompts.save_pretrained(tmp_path / "prompts")
    again = SoftPromptCallback(str(tmp_path / "prompts"))
    trainer(tmp_path, again).validate(module, loader(), verbose=False)
    assert torch.equal(again.prompts["alpha"], prompts["alpha"]) and not again.prompts["beta"].requires_grad


def test_a_task_that_is_unfrozen_while_the_run_goes_on_trains(tmp_path, monkeypatch) -> None:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            self.before = pl_module.model.soft_prompts["beta"].detach().clone()
            if trainer.current_epoch == 1:
                pl_module.model.soft_prompts.unfreeze("beta")

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            moved = not torch.equal(pl_module.model.soft_prompts["beta"], self.before)
            assert moved == (trainer.current_epoch == 1)

    module = modules.Plain()
    prompts = SoftPrompts.for_model(module.model, TASKS)
    prompts.freeze("beta")
    run = trainer(tmp_path, SoftPromptCallback(prompts), Thaw(), max_epochs=2)
    run.fit(module, loader())
    assert run.global_step == 6
    assert sum(p is prompts["beta"] for group in run.optimizers[0].param_groups for p in group["params"]) == 1
    monkeypatch.setattr(type(run), "world_size", 2)
    run.optimizers = [torch.optim.AdamW([prompts["alpha"], prompts["gamma"]])]
    with pytest.raises(SoftPromptError, match="'beta' cannot be unfrozen while several processes train"):
        SoftPromptCallback(prompts)._add_unfrozen(run)


def test_two_callbacks_and_a_model_that_is_never_called(tmp_path) -> None:
    callbacks = SoftPromptCallback({"x": 3}), SoftPromptCallback({"y": 3})
    with pytest.raises(SoftPromptError, match="a Trainer takes one SoftPromptCallback"):
        trainer(tmp_path, *callbacks).fit(modules.Plain(), loader())

    class Bypasses(modules.Plain):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(32, 1)

        def training_step(self, batch, batch_idx):
            hidden = self.model.model(input_ids=batch["input_ids"]).last_hidden_state
            return self.head(hidden).square().mean()

    with pytest.raises(SoftPromptError, match="never called the causal LM itself"):
        trainer(tmp_path, SoftPromptCallback(TASKS)).fit(Bypasses(), loader())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_the_first_batch_may_be_skipped(tmp_path) -> None:
    class Skips(modules.Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    module, start = Skips(), Start()
    trainer(tmp_path, SoftPromptCallback(TASKS), start).fit(module, loader())
    assert_exactly_the_prompts_moved(module, start)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("what", "key"),
    [("compiled", "tasks"), ("checkpointed", "task_ids"), ("with a LoRA", "tasks"), ("with a LoRA", "task_ids")],
)
def test_a_base_as_people_have_it_trains_as_a_plain_one(tmp_path, what: str, key: str) -> None:
    def fit(module: LightningModule) -> SoftPrompts:
        callback = SoftPromptCallback(TASKS)
        trainer(tmp_path, callback).fit(module, loader(key=key, names=key == "tasks"))
        return callback.prompts

    plain, other = modules.Plain(), modules.Plain()
    if what == "compiled":
        other.model = torch.compile(other.model, backend="aot_eager", dynamic=True)
    elif what == "checkpointed":
        other.model.gradient_checkpointing_enable()
    else:  # a LoRA that adds nothing yet; PEFT's wrapper keeps task_ids to itself, so they come from the batch
        other.model = peft.get_peft_model(
            other.model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        )
    expected, found = fit(plain), fit(other)
    for task in TASKS:
        assert torch.allclose(found[task], expected[task], atol=1e-5)
        assert found[task].grad is not None


def test_another_module_starts_anew_and_the_same_one_goes_on(tmp_path) -> None:
    class Start(Callback):
        def __init__(self) -> None:
            self.prompts: list[dict[str, torch.Tensor]] = []

        def on_train_start(self, trainer, pl_module) -> None:
            self.prompts.append(modules.snapshot({task: callback.prompts[task] for task in TASKS}))

    def starts_like(one: int, other: int) -> bool:
        return all(torch.equal(start.prompts[one][task], start.prompts[other][task]) for task in TASKS)

    callback, start = SoftPromptCallback(TASKS), Start()
    first, shared = modules.Plain(), modules.Plain()
    shared.model = first.model  # a fold whose module holds the base of the fold before
    late = modules.BuiltLate()
    kept = []
    for module in (first, late, shared):
        trainer(tmp_path, callback, start).fit(module, loader())
        assert module.model.soft_prompts is callback.prompts
        kept.append(callback.prompts)
    assert starts_like(0, 1) and starts_like(0, 2) and len(set(map(id, kept))) == 3
    trained = modules.snapshot({task: kept[1][task] for task in TASKS})
    trainer(tmp_path, callback).validate(late, loader(), verbose=False)  # an earlier module has what it learned
    assert callback.prompts is kept[1] and all(torch.equal(kept[1][task], trained[task]) for task in TASKS)
    trainer(tmp_path, callback, start).fit(late, loader())
    assert callback.prompts is kept[1] and all(torch.equal(start.prompts[3][task], trained[task]) for task in TASKS)


def test_prompts_that_were_given_go_on_with_another_module(tmp_path) -> None:
    prompts = SoftPrompts.for_model(modules.Plain().model, TASKS)
    callback = SoftPromptCallback(prompts)
    trainer(tmp_path, callback).fit(modules.Plain(), loader())
    trained = modules.snapshot({task: prompts[task] for task in TASKS})
    other = modules.Plain()
    trainer(tmp_path, callback).validate(other, loader(), verbose=False)
    assert callback.prompts is prompts is other.model.soft_prompts
    assert all(torch.equal(prompts[task], trained[task]) for task in TASKS)


def test_another_callback_makes_prompts_of_its_own_for_the_same_module(tmp_path) -> None:
    module, first, second = modules.Plain(), SoftPromptCallback(TASKS), SoftPromptCallback({**TASKS, "beta": 3})
    for callback in (first, second):
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert second.prompts is module.model.soft_prompts is not first.prompts and len(second.prompts["beta"]) == 3


def test_a_run_in_micro_batches_trains_what_a_run_of_whole_batches_does(tmp_path) -> None:
    found = {}
    for size in (None, 2):
        callback = SoftPromptCallback(TASKS, logits="labels", micro_batch_size=size)
        run = trainer(tmp_path, callback, max_epochs=2)
        run.fit(Plain(), loader(), loader(4))
        loss = float(run.callback_metrics["val_loss"])
        found[size] = loss, {task: callback.prompts[task].detach().clone() for task in TASKS}
    (loss, prompts), (other_loss, others) = found.values()
    assert other_loss == pytest.approx(loss, rel=1e-4)
    for task, prompt in prompts.items():
        assert tiny.relative_error(others[task], prompt) < 1e-4

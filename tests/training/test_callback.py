"""The callback on LightningModules that have never heard of this library."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from transformers import LlamaForSequenceClassification

from lightning_softprompt import SoftPromptCallback, SoftPromptError, SoftPrompts, Tokens, detach
from lightning_softprompt.attachment.attach import attachment_of
from tests import modules, tiny
from tests.modules import TASKS, loader, trainer


class Start(Callback):
    """Keeps every parameter as it was when training started."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.values = modules.snapshot(dict(pl_module.named_parameters()))


def assert_exactly_the_prompts_moved(module: LightningModule, start: Start, tasks=tuple(TASKS)) -> None:
    for name, value in module.named_parameters():
        moved = not torch.equal(value, start.values[name])
        expected = name.startswith("head.") or any(name.endswith(f"soft_prompts.prompt:{task}") for task in tasks)
        assert moved == expected, name
    for name, value in modules.base_state().items():
        assert torch.equal(module.model.state_dict()[name], value), name


@pytest.mark.parametrize("make", modules.EVERY_MODULE)
@pytest.mark.parametrize("names", [False, True])
def test_exactly_the_prompts_move(make, names: bool, tmp_path) -> None:
    module, start = make(), Start()
    callback = SoftPromptCallback(TASKS)
    trainer(tmp_path, callback, start).fit(module, loader(names=names, key="tasks" if names else "task_ids"))
    assert callback.prompts.tasks == tuple(TASKS)
    assert_exactly_the_prompts_moved(module, start)


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


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("make", [modules.Plain, modules.BuiltLate])
def test_every_stage_attaches_by_itself(stage: str, make, tmp_path) -> None:
    module = make()
    hard = {task: Tokens(ids) for task, ids in tiny.HARD.items()}
    run = trainer(tmp_path, SoftPromptCallback(hard))
    found = getattr(run, stage)(module, dataloaders=loader(6, 6))
    bare = tiny.tiny_model("llama")
    batch = modules.Rows(6).collate(list(modules.Rows(6)))
    losses, weights = [], []
    for index, task in enumerate(batch["task_ids"].tolist()):
        text = batch["input_ids"][index][batch["attention_mask"][index] == 1].tolist()
        row = tiny.Row(task, tiny.HARD[tiny.TASKS[task]], text)
        expected = tiny.hard_row(bare, row)
        if stage == "predict":
            assert tiny.relative_error(found[0][index, : len(text)], expected) < 1e-5
        ids = torch.tensor([row.prompt + row.text])
        labels = ids.clone()
        labels[:, : len(row.prompt)] = -100
        losses.append(float(bare(ids, labels=labels).loss.detach()))
        weights.append(len(text))
    if stage != "predict":
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        assert next(iter(found[0].values())) == pytest.approx(mean, rel=1e-5)


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


def test_a_module_without_a_causal_lm_or_with_two(tmp_path) -> None:
    class Without(modules.Plain):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(2, 2)

    class Two(modules.Plain):
        def __init__(self):
            super().__init__()
            self.teacher = tiny.tiny_model("gpt2")

    with pytest.raises(SoftPromptError, match="Without has no Hugging Face causal LM in it after setup"):
        trainer(tmp_path, SoftPromptCallback(TASKS)).fit(Without(), loader())
    with pytest.raises(SoftPromptError, match=r"several causal LMs \('model', 'teacher'\); say which one"):
        trainer(tmp_path, SoftPromptCallback(TASKS)).fit(Two(), loader())
    module, start = Two(), Start()
    module.teacher.requires_grad_(False)
    trainer(tmp_path, SoftPromptCallback(TASKS, model="model"), start).fit(module, loader())
    assert_exactly_the_prompts_moved(module, start)
    assert attachment_of(module.teacher) is None


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


def test_a_deep_copied_module_is_wired_to_itself(tmp_path) -> None:
    module = modules.Plain()
    trainer(tmp_path, SoftPromptCallback(TASKS)).fit(module, loader())
    twin = copy.deepcopy(module)
    assert twin.configure_optimizers.func.__self__.module is twin
    batch = modules.Rows(3).collate(list(modules.Rows(3)))
    expected = module.predict_step(batch, 0)
    with torch.no_grad():
        for parameter in module.model.soft_prompts.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin.predict_step(batch, 0), expected)


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


def test_a_detached_module_stays_detached(tmp_path) -> None:
    module = modules.Plain()
    trainer(tmp_path, SoftPromptCallback(TASKS)).fit(module, loader())
    detach(module.model)
    before = modules.base_state()

    class Plainly(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch.pop("task_ids")

    trainer(tmp_path, Plainly()).fit(module, loader())
    assert attachment_of(module.model) is None
    assert set(module.state_dict()) == {f"model.{name}" for name in before}
    assert any(not torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


def test_an_optimizer_made_from_names(tmp_path) -> None:
    class Named(modules.Plain):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.named_parameters(), lr=0.1)

    module, start = Named(), Start()
    trainer(tmp_path, SoftPromptCallback(TASKS), start).fit(module, loader())
    assert_exactly_the_prompts_moved(module, start)
    names = module.optimizers().param_groups[0]["param_names"]
    assert names == [f"model.soft_prompts.prompt:{task}" for task in sorted(TASKS)]


def test_an_alias_of_the_base_is_left_out_of_checkpoints_too(tmp_path) -> None:
    class Aliased(modules.Plain):
        def __init__(self):
            super().__init__()
            self.backbone = self.model.model

    module = Aliased()
    trainer(tmp_path, SoftPromptCallback(TASKS)).fit(module, loader())
    assert set(module.state_dict()) == {f"model.soft_prompts.prompt:{task}" for task in TASKS}
    module.load_state_dict(module.state_dict())


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


def test_a_classification_head_is_refused_by_name(tmp_path) -> None:
    module = modules.Plain()
    module.model = LlamaForSequenceClassification(tiny.tiny_model().config)
    with pytest.raises(SoftPromptError, match="LlamaForSequenceClassification has no language-modelling head"):
        trainer(tmp_path, SoftPromptCallback(TASKS)).fit(module, loader())

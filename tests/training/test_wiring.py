"""How a LightningModule is wired: its steps, its optimizers, and where its causal LM is found."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import LlamaForSequenceClassification

from lightning_softprompt import SoftPromptCallback, SoftPromptError, Tokens, detach
from lightning_softprompt.attachment.attach import attachment_of
from tests import modules, tiny
from tests.modules import TASKS, loader, trainer
from tests.training.moved_parameters import Start, assert_exactly_the_prompts_moved


@pytest.mark.parametrize("make", modules.EVERY_MODULE)
@pytest.mark.parametrize("names", [False, True])
def test_exactly_the_prompts_move(make, names: bool, tmp_path) -> None:
    module, start = make(), Start()
    callback = SoftPromptCallback(TASKS)
    trainer(tmp_path, callback, start).fit(module, loader(names=names, key="tasks" if names else "task_ids"))
    assert callback.prompts.tasks == tuple(TASKS)
    assert_exactly_the_prompts_moved(module, start)


class InPairs(modules.Plain):
    """Takes `(inputs, labels)`, and hands the model nothing that says which task a row belongs to."""

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_batch_of_inputs_and_labels_is_routed_as_one_dict_is(kind: type, tmp_path) -> None:
    found = []
    for module, collated in (
        (modules.Plain(), lambda batch: batch),
        (InPairs(), lambda batch: kind([batch, batch.pop("labels")])),
    ):
        rows = modules.Rows(12)
        data = torch.utils.data.DataLoader(
            rows, 4, collate_fn=lambda batch, as_=collated, of=rows: as_(of.collate(batch))
        )
        callback = SoftPromptCallback(TASKS)
        trainer(tmp_path, callback).fit(module, data)
        found.append({task: callback.prompts[task].detach().clone() for task in TASKS})
    assert all(torch.equal(found[0][task], found[1][task]) for task in TASKS)


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


def test_a_classification_head_is_refused_by_name(tmp_path) -> None:
    module = modules.Plain()
    module.model = LlamaForSequenceClassification(tiny.tiny_model().config)
    with pytest.raises(SoftPromptError, match="LlamaForSequenceClassification has no language-modelling head"):
        trainer(tmp_path, SoftPromptCallback(TASKS)).fit(module, loader())


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_a_model_that_is_built_anew_in_each_run_has_its_prompts_in_each(where: str, tmp_path) -> None:
    class Kept(modules.OwnLoss):  # no call of its model names the tasks
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", super().training_step(batch, batch_idx))

    class Anew(Kept):
        def __init__(self) -> None:
            super().__init__()
            self.model = None

    setattr(Anew, where, lambda self, stage="": setattr(self, "model", tiny.tiny_model("llama")))
    module, callback, start = Anew(), SoftPromptCallback(TASKS), Start()
    trainer(tmp_path, callback).fit(module, loader())
    (expected,) = trainer(tmp_path, SoftPromptCallback(callback.prompts)).validate(Kept(), loader(), verbose=False)
    (found,) = trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert found == expected and module.model.soft_prompts is callback.prompts
    trainer(tmp_path, callback, start).fit(module, loader())
    assert_exactly_the_prompts_moved(module, start)
    trainer(tmp_path).validate(module, loader(), verbose=False)  # nobody asks for prompts
    assert attachment_of(module.model) is None


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


def test_an_optimizer_that_holds_on_to_its_parameters_trains_the_prompts(tmp_path) -> None:
    class Quadratic(modules.BuiltBefore):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.LBFGS(self.model.parameters(), lr=0.01)

    module, start = Quadratic(), Start()
    trainer(tmp_path, SoftPromptCallback(TASKS), start).fit(module, loader())
    assert_exactly_the_prompts_moved(module, start)


def test_an_optimizer_made_from_names(tmp_path) -> None:
    class Named(modules.Plain):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.named_parameters(), lr=0.1)

    module, start = Named(), Start()
    trainer(tmp_path, SoftPromptCallback(TASKS), start).fit(module, loader())
    assert_exactly_the_prompts_moved(module, start)
    names = module.optimizers().param_groups[0]["param_names"]
    assert names == [f"model.soft_prompts.prompt:{task}" for task in sorted(TASKS)]


@pytest.mark.filterwarnings("always:Found")
@pytest.mark.parametrize("others", [0, 1])
def test_only_modules_in_eval_mode_that_are_not_the_base_are_warned_of(others: int, tmp_path, recwarn) -> None:
    module = modules.Plain()
    module.frozen = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(others)).train(not others)
    trainer(tmp_path, SoftPromptCallback(TASKS)).fit(module, loader())
    assert sum("in eval mode at the start" in str(each.message) for each in recwarn) == others

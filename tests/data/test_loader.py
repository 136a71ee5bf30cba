"""The loader goes on where a checkpoint was saved: in the middle of an epoch, at its end, or with a refusal."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError
from tests.data.rows import ROWS, TASKS, module, write


def test_a_run_is_resumed_in_the_middle_of_an_epoch_bit_for_bit(tokenizer, tmp_path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_softprompt import SoftPromptCallback
    from tests import modules

    rows = [{**ROWS[number % 2], "text": "a b c d e"[: 1 + 2 * (number % 5)]} for number in range(24)]
    path = write(tmp_path / "rows.jsonl", rows)

    def run(folder, resume=None, workers: int = 0, **options):
        data = module(tokenizer, train=path, batch_size=3, temperature=2.0, num_workers=workers)
        whole, prompts = modules.Plain(), SoftPromptCallback(dict.fromkeys(TASKS, 3))
        saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        options = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 0, **options}
        modules.trainer(folder, prompts, saving, **options).fit(whole, datamodule=data, ckpt_path=resume)
        return {task: prompts.prompts[task].detach().clone() for task in TASKS}

    whole = tmp_path / "whole"
    expected = run(whole)
    for step in (5, 10):
        for workers in (0, 1):
            found = run(tmp_path / f"{step} {workers}", whole / f"step={step}.ckpt", workers)
            assert all(torch.equal(found[task], expected[task]) for task in TASKS)


def test_a_module_with_a_schedule_is_resumed_in_the_middle_of_an_epoch_bit_for_bit(tiny_base, tmp_path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_softprompt import CausalLMModule, SoftPromptCallback, TaskDataModule, TaskTemplate
    from tests import modules

    words = ["good", "bad", "film", "news", "product", "a", "the", "and", "of", "is"]
    path = write(tmp_path / "rows.jsonl", [{"task": "free", "text": word, "label": "it"} for word in words])

    def run(folder, resume=None) -> tuple[torch.Tensor, torch.Tensor]:
        data = TaskDataModule(str(tiny_base), {"free": TaskTemplate()}, train=path, batch_size=2)
        prompts = SoftPromptCallback({"free": 3})
        saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 0}
        run = modules.trainer(folder, prompts, saving, **options)
        run.fit(CausalLMModule(str(tiny_base)), datamodule=data, ckpt_path=resume)
        return prompts.prompts["free"].detach().clone(), run.callback_metrics["train/loss"]

    whole = tmp_path / "whole"
    expected = run(whole)
    for step in (3, 6):
        found = run(tmp_path / f"{step}", whole / f"step={step}.ckpt")
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("batches", [0, 2, 3, 5])
def test_a_batch_in_whose_middle_a_run_ended_comes_again(batches: int, tokenizer, tmp_path) -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    from lightning_softprompt import SoftPromptCallback
    from tests import modules

    path = write(tmp_path / "rows.jsonl", [{**ROWS[0], "text": text} for text in ("a", "a b", "c", "d e c", "so", "d")])

    class Ends(modules.Plain):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == batches and self.ends:
                raise RuntimeError("here")
            return super().training_step(batch, batch_idx)

    def run(ends: bool = False, resume=None) -> torch.Tensor:
        module_, prompts = Ends(), SoftPromptCallback({"tone": 3})
        module_.ends = ends
        saving = LambdaCallback(on_exception=lambda trainer, *_: trainer.save_checkpoint(tmp_path / "ended.ckpt"))
        trainer = modules.trainer(tmp_path, prompts, saving, max_epochs=2, limit_val_batches=0)
        trainer.fit(module_, datamodule=module(tokenizer, train=path, batch_size=2), ckpt_path=resume)
        assert trainer.global_step == 6
        return prompts.prompts["tone"].detach().clone()

    expected = run()
    with pytest.raises(RuntimeError, match="here"):
        run(ends=True)
    assert torch.equal(run(resume=tmp_path / "ended.ckpt"), expected)


@pytest.mark.parametrize("saving", [{}, {"save_on_train_epoch_end": True}, {"every_n_train_steps": 4}], ids=str)
@pytest.mark.parametrize("validates", [False, True])
def test_a_run_that_was_saved_at_the_end_of_an_epoch_goes_on_with_the_next(
    saving: dict, validates: bool, tokenizer, tmp_path
) -> None:
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    from lightning_softprompt import SoftPromptCallback
    from tests import modules

    rows = [{**ROWS[number % 2], "text": "a b c d e"[: 1 + 2 * (number % 5)]} for number in range(24)]
    path = write(tmp_path / "rows.jsonl", rows)

    class Seen(Callback):
        def __init__(self) -> None:
            self.batches: list[tuple[int, int, list]] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.batches.append((trainer.current_epoch, batch_idx, batch["input_ids"].tolist()))

    def run(resume=None) -> Seen:
        data = module(tokenizer, train=path, validation=path, batch_size=6)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **saving)
        options = {"max_epochs": 3, "enable_checkpointing": True, "limit_val_batches": 1.0 if validates else 0}
        callbacks = [SoftPromptCallback(dict.fromkeys(TASKS, 3)), keep, seen := Seen()]
        modules.trainer(tmp_path, *callbacks, **options).fit(modules.Plain(), datamodule=data, ckpt_path=resume)
        return seen

    whole = run().batches
    assert len(whole) == 12
    assert run(tmp_path / "epoch=0-step=4.ckpt").batches == whole[4:]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_batches_may_be_overfitted(tokenizer, tmp_path) -> None:
    from lightning_softprompt import SoftPromptCallback
    from tests import modules

    path = write(tmp_path / "rows.jsonl", [{**ROWS[0], "text": "a b c d e"[: 1 + 2 * (row % 5)]} for row in range(24)])
    data = module(tokenizer, train=path, validation=path, batch_size=6)
    run = modules.trainer(tmp_path, SoftPromptCallback(dict.fromkeys(TASKS, 3)), max_epochs=2, overfit_batches=2)
    run.fit(modules.Plain(), datamodule=data)
    assert run.global_step == 4


def test_a_loader_begins_anew_whenever_it_is_asked_to(tokenizer, tmp_path) -> None:
    data = module(tokenizer, train=write(tmp_path / "rows.jsonl", ROWS * 4), batch_size=5)
    data.setup("fit")
    loader = data.train_dataloader()
    first = next(iter(loader))
    batches = list(loader)
    assert len(batches) == 3 and batches[0]["input_ids"].tolist() == first["input_ids"].tolist()
    loader.load_state_dict({"epoch": 0, "batches": 2, "rows_a_step": 5})
    assert [batch["tasks"] for batch in loader] == [batches[2]["tasks"]] and len(list(loader)) == 3
    loader.load_state_dict({"epoch": 0, "batches": 2, "rows_a_step": 5})
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 3


def test_a_run_does_not_go_on_in_the_middle_of_an_epoch_with_other_batches(tokenizer, tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS * 4)
    loaders = []
    for batch_size in (5, 4):
        data = module(tokenizer, train=path, batch_size=batch_size)
        data.setup("fit")
        loaders.append(data.train_dataloader())
    batches = iter(loaders[0])
    for saved_at in (1, 2):
        next(batches)
        loaders[1].load_state_dict({**loaders[0].state_dict(), "batches": 3 * saved_at - 2})  # also beyond its length
        with pytest.raises(SoftPromptError, match="middle of an epoch, at 5 rows a step, cannot go on at 4; use"):
            next(iter(loaders[1]))

"""What is measured before a run: equal to what validation logs of the same prompts, and never twice."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW

from lightning_softprompt import BestPrompts, CausalLMModule, SoftPromptCallback, TaskDataModule, TaskTemplate
from lightning_softprompt.cli.comparison import KEY, Comparison, of_stage
from tests.cli.command_line import ROOT

DATA = ROOT / "examples/data"
TASKS = {
    "sentiment": TaskTemplate("{text} =>", " {label}", labels=[" positive", " negative"]),
    "source": TaskTemplate("{text} =>", " {label}"),  # free text
}
STARTS = {"sentiment": "Decide whether the text is positive", "source": 3}


def fitted(
    base: Path,
    folder: Path,
    tasks: object = None,
    best: BestPrompts | None = None,
    rate: float = 0.01,
    **options: object,
) -> tuple[Trainer, Comparison]:
    comparison = Comparison(best)
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    callbacks = [SoftPromptCallback(tasks or STARTS), saving, comparison, *([best] if best else [])]
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
    checkpoint = settings.pop("ckpt_path", None)
    trainer = Trainer(callbacks=callbacks, enable_model_summary=False, **settings)
    rows = {split: str(DATA / f"reviews.{split}.jsonl") for split in ("train", "validation")}
    data = TaskDataModule(str(base), TASKS, **rows, batch_size=3)
    trainer.fit(CausalLMModule(str(base), partial(AdamW, lr=rate, weight_decay=0.0)), data, ckpt_path=checkpoint)
    return trainer, comparison


def logged_without_training(base: Path, folder: Path, **options: object) -> dict[str, float]:
    trainer, _ = fitted(base, folder, limit_train_batches=0.0, **options)
    return of_stage(trainer.callback_metrics)


def test_the_start_is_what_validation_logs_and_no_prompt_is_the_bare_model(tiny_base, tmp_path, monkeypatch) -> None:
    trainer, comparison = fitted(tiny_base, tmp_path / "run")
    module, data = CausalLMModule(str(tiny_base)), trainer.datamodule
    callback = SoftPromptCallback(STARTS)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    validated = Trainer(callbacks=[callback], **options)
    validated.validate(module, data, verbose=False)
    assert comparison.before["start"] == pytest.approx(of_stage(validated.callback_metrics), rel=1e-5)

    # The bare model by hand: the loss of free text, and the label that is likelier.
    bare, hits, losses = module.model, [], []
    del callback
    for example in data.examples["validation"]:
        ids = torch.tensor([[*example.text_ids, *example.target_ids]])
        logits = bare(ids, tasks=[None]).logits[0, len(example.text_ids) - 1 : -1].log_softmax(-1)
        scores = logits.gather(1, torch.tensor(example.target_ids)[:, None])[:, 0]
        if example.task == "source":
            losses.append((-scores.sum().item(), len(scores)))
        else:
            firsts = [logits[0, ids[0]].item() for ids in data.label_ids("sentiment")]
            hits.append(firsts.index(max(firsts)) == data.label_ids("sentiment").index(list(example.target_ids)))
    found = comparison.before["no prompt"]
    assert found["accuracy/sentiment"] == pytest.approx(sum(hits) / len(hits))
    assert found["loss/source"] == pytest.approx(sum(a for a, _ in losses) / sum(n for _, n in losses), rel=1e-5)


def test_measuring_changes_nothing_in_training(tiny_base, tmp_path) -> None:
    with_it, _ = fitted(tiny_base, tmp_path / "with")
    Comparison.on_train_start, kept = (lambda *_: None), Comparison.on_train_start
    try:
        without, other = fitted(tiny_base, tmp_path / "without")
    finally:
        Comparison.on_train_start = kept
    assert other.before == {}
    for name, value in with_it.lightning_module.state_dict().items():
        torch.testing.assert_close(value, without.lightning_module.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_holds_what_was_measured_and_its_own_metrics(tiny_base, tmp_path) -> None:
    trainer, comparison = fitted(tiny_base, tmp_path / "run", max_epochs=2)
    last = torch.load(tmp_path / "run/epoch=1.ckpt", weights_only=True)[KEY]
    first = torch.load(tmp_path / "run/epoch=0.ckpt", weights_only=True)[KEY]
    assert last["tuned"] == of_stage(trainer.callback_metrics) != first["tuned"]
    assert {name: first[name] for name in ("no prompt", "start")} == comparison.before

    _, resumed = fitted(tiny_base, tmp_path / "more", max_epochs=2, ckpt_path=tmp_path / "run/epoch=0.ckpt")
    assert resumed.before == comparison.before
    held = Counter(example.task for example in trainer.datamodule.examples["validation"])
    assert resumed.rows == comparison.rows == held and set(held) == set(TASKS)
    table = resumed.table(STARTS, resumed.tuned(trainer.callback_metrics), tuple(TASKS))
    assert [row["rows"] for row in table] == [held[task] for task in TASKS]
    foreign = torch.load(tmp_path / "run/epoch=0.ckpt", weights_only=True)
    del foreign[KEY]
    torch.save(foreign, tmp_path / "foreign.ckpt")
    _, resumed = fitted(tiny_base, tmp_path / "more", max_epochs=2, ckpt_path=tmp_path / "foreign.ckpt")
    assert set(resumed.before) == {"no prompt"}  # the start is gone


def test_nothing_is_measured_without_validation_rows_or_of_another_module(tiny_base, tmp_path) -> None:
    trainer, comparison = fitted(tiny_base, tmp_path, limit_val_batches=0)
    assert comparison.before == {} and comparison.table(STARTS, {}, ("sentiment",)) == []
    trainer.fit_loop.epoch_loop.val_loop.setup_data = lambda: None
    comparison.on_train_start(trainer, LightningModule())
    assert comparison.before == {}
    assert all(math.isfinite(value) for value in of_stage({"val/a": torch.tensor(1.0), "train/b": 2.0}).values())


def test_the_table_says_over_how_many_rows(tiny_base, tmp_path) -> None:
    trainer, comparison = fitted(tiny_base, tmp_path, limit_val_batches=2)
    first = trainer.datamodule.examples["validation"][:6]  # two batches of three
    assert comparison.rows == Counter(example.task for example in first)


def test_a_task_that_only_gets_worse_ends_at_its_start(tiny_base, tmp_path) -> None:
    best = BestPrompts({"val/loss": "min"})
    trainer, comparison = fitted(tiny_base, tmp_path / "run", best=best, rate=100.0)
    fresh, _ = fitted(tiny_base, tmp_path / "fresh", limit_train_batches=0.0)
    found, start = (each.callbacks[0].prompts["sentiment"] for each in (trainer, fresh))
    assert best.best["sentiment"].step == 0 and torch.equal(found, start)
    tuned, logged = comparison.tuned(trainer.callback_metrics), trainer.callback_metrics["val/loss/sentiment"]
    assert tuned["loss/sentiment"] == comparison.before["start"]["loss/sentiment"] < logged
    row = comparison.table(STARTS, tuned, tuple(TASKS))[0]
    assert row["of step"] == 0 and row["tuned"] == row["hard prompt"]


def test_a_task_that_gets_better_says_of_which_step_it_is(tiny_base, tmp_path) -> None:
    best = BestPrompts()
    trainer, comparison = fitted(tiny_base, tmp_path / "run", best=best, max_epochs=3)
    row = comparison.table(STARTS, comparison.tuned(trainer.callback_metrics), tuple(TASKS))[1]
    assert row["of step"] == best.best["source"].step > 0 and row["tuned"] < row["start"]


def test_a_run_that_ends_between_validations_is_measured_at_its_end(tiny_base, tmp_path) -> None:
    best = BestPrompts({"val/loss": "min"})
    trainer, comparison = fitted(tiny_base, tmp_path / "run", best=best, max_epochs=-1, max_steps=7)
    assert trainer.global_step == 7 == best.validated == best.best["source"].step
    row = comparison.table(STARTS, comparison.tuned(trainer.callback_metrics), tuple(TASKS))[1]
    assert row["of step"] == 7 and row["tuned"] < row["start"]

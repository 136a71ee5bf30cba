"""One `CausalLMModule` in several runs, one behind the other, and data on which it cannot be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_softprompt import (
    CausalLMModule,
    SoftPromptCallback,
    SoftPromptError,
    Source,
    TaskDataModule,
    TaskTemplate,
)
from tests.data.rows import write
from tests.modules import trainer

TEMPLATES = {"tone": TaskTemplate("{text} =>", "{label}", labels=["good", "bad"]), "free": TaskTemplate("{text}")}
ROWS = [
    {"task": "tone", "text": "it is so good", "label": "good"},
    {"task": "tone", "text": "the film", "label": "bad"},
    {"task": "free", "text": "the news", "label": "it is a film"},
    {"task": "free", "text": "a", "label": "product"},
]


def data_of(base: Path, folder: Path, rows: list[dict[str, str]], **options: Any) -> TaskDataModule:
    path = write(folder / "rows.jsonl", rows)
    tasks = {task: TEMPLATES[task] for task in TEMPLATES if any(row["task"] == task for row in rows)}
    return TaskDataModule(str(base), tasks, path, path, batch_size=2, **options)


def test_a_second_run_may_have_other_tasks(tiny_base, tmp_path) -> None:
    module, callback = CausalLMModule(str(tiny_base)), SoftPromptCallback({"tone": 2})
    trainer(tmp_path, callback).fit(module, data_of(tiny_base, tmp_path, ROWS[:2]))
    callback.prompts.add("free", 3, model=module.model)
    data = data_of(tiny_base, tmp_path, ROWS)
    run = trainer(tmp_path, callback)
    run.fit(module, data)
    assert {"val/loss/tone", "val/accuracy/tone", "val/loss/free"} <= set(run.callback_metrics)
    fresh = CausalLMModule(str(tiny_base))
    expected = trainer(tmp_path, SoftPromptCallback(callback.prompts)).validate(fresh, data, verbose=False)
    assert run.validate(module, data, verbose=False) == expected


def test_a_validation_that_was_interrupted_is_in_no_later_one(tiny_base, tmp_path) -> None:
    class Interrupts(Callback):
        def on_validation_batch_end(self, *_: object) -> None:
            raise RuntimeError("here")

    module, data = CausalLMModule(str(tiny_base)), data_of(tiny_base, tmp_path, ROWS)
    callback = SoftPromptCallback({"tone": 2, "free": 3})
    expected = trainer(tmp_path, callback).validate(module, data, verbose=False)
    with pytest.raises(RuntimeError, match="here"):
        trainer(tmp_path, callback, Interrupts()).validate(module, data, verbose=False)
    assert trainer(tmp_path, callback).validate(module, data, verbose=False) == expected


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_row_without_a_target_is_refused(stage: str, tiny_base, tmp_path) -> None:
    data = data_of(tiny_base, tmp_path, [*ROWS, {"task": "free", "text": "the product"}], needs_targets=False)
    module, callback = CausalLMModule(str(tiny_base)), SoftPromptCallback({"tone": 2, "free": 3})
    with pytest.raises(SoftPromptError, match=r"row 'theproduct' of the task 'free' has no target; leave needs_target"):
        getattr(trainer(tmp_path, callback), stage)(module, data)


def test_where_none_lacks_a_target_nothing_is_refused_but_a_stream(tiny_base, tmp_path) -> None:
    data = data_of(tiny_base, tmp_path, ROWS, needs_targets=False)
    module, callback = CausalLMModule(str(tiny_base)), SoftPromptCallback({"tone": 2, "free": 3})
    run = trainer(tmp_path, callback)
    run.fit(module, data)
    assert torch.isfinite(run.callback_metrics["val/loss"])
    source = Source(data.sources["train"][0].path, streaming=True)
    streamed = TaskDataModule(str(tiny_base), TEMPLATES, source, needs_targets=False)
    with pytest.raises(SoftPromptError, match="streamed rows may have no target with needs_targets=False"):
        trainer(tmp_path, callback, limit_val_batches=0).fit(module, streamed)

"""Tests of what goes to a device, and of where a training step waits for it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_softprompt import (
    CausalLMModule,
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPrompts,
    TaskDataModule,
    TaskTemplate,
    Tokens,
    attach,
)
from lightning_softprompt.training.objectives import task_means
from lightning_softprompt.transfer import to_device
from tests import tiny
from tests.modules import TASKS, Plain, loader, trainer
from tests.waits import Waits

CPU = torch.device("cpu")
TEMPLATES = {
    "kind": TaskTemplate("{text} is", "{label}", labels=["film", "news"]),
    "free": TaskTemplate("so {text}", "{label}"),
}


def test_several_sequences_go_over_together() -> None:
    ids, nothing, lengths = to_device(CPU, [3, -1], [], (2, 0))
    assert (ids.tolist(), nothing.tolist(), lengths.tolist()) == ([3, -1], [], [2, 0])
    assert ids.dtype == lengths.dtype == torch.int64


def test_numbers_may_be_of_another_dtype() -> None:
    (found,) = to_device(CPU, [0.5, float("inf")], dtype=torch.float32)
    assert found.tolist() == [0.5, float("inf")] and found.dtype == torch.float32


def test_a_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        (found,) = to_device(CPU, [1, 2])
    assert found.tolist() == [1, 2]


def attached(**options: Any) -> Any:
    model = tiny.tiny_model("llama")
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()})
    return attach(model, prompts, **options)


@pytest.mark.parametrize(("prefix", "logits", "most"), [
    ("always", "all", 0), ("never", "all", 0), ("always", "labels", 1), ("never", "labels", 1),
])  # fmt: skip
def test_a_step_by_names_waits_for_nothing_but_the_positions_of_labels(prefix: str, logits: str, most: int) -> None:
    batch = tiny.random_batch(0, "right")
    model = attached(prefix=prefix, logits=logits)
    names = [tiny.TASKS[row.task] if row.task >= 0 else None for row in batch.rows]
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    with Waits() as waits:
        model(**inputs, tasks=names).loss.backward()
    assert sum(waits.places.values()) == most, waits.places
    with Waits() as waits:  # a tensor of tasks has to be read
        model(**inputs, task_ids=batch.task_ids).loss.backward()
    assert sum(waits.places.values()) == most + 1, waits.places


def waits_a_step(folder: Path, module: LightningModule, data: Any, *callbacks: Any) -> dict[str, float]:
    """How often each place waits in a step, and how often it waits beside those of the first steps."""
    found = []
    for steps in (2, 6):
        with Waits() as waits:
            run = trainer(folder, *copy.deepcopy(callbacks), max_steps=steps, max_epochs=-1, limit_val_batches=0)
            run.fit(copy.deepcopy(module), data)
        found.append(waits.places)
    return {place: each for place in found[1] if (each := (found[1][place] - found[0][place]) / 4) > 0}


@pytest.mark.parametrize(("names", "callback", "most"), [
    (True, None, 0),
    (False, None, 2),  # a tensor on the CPU is read by the module and by the model, one on a GPU once
    (True, PromptGradientClipping(), 0),
    (True, PromptGradientClipping(method="normalized"), 0),
    (True, PromptGradientClipping(method="percentile"), 1),
    (True, CollapseGuard(), 1),
    (True, PromptGradientNorm(every_n_steps=1), 1),
])  # fmt: skip
def test_a_step_of_a_users_own_module(tmp_path: Path, names: bool, callback: Any, most: int) -> None:
    prompts = SoftPromptCallback(tasks=TASKS)
    key = "tasks" if names else "task_ids"
    found = waits_a_step(
        tmp_path, Plain(), loader(24, names=names, key=key), prompts, *([callback] if callback else [])
    )
    assert sum(found.values()) <= most, found


def test_a_step_of_causal_lm_module(tmp_path: Path, tiny_base: Path) -> None:
    data = TaskDataModule(str(tiny_base), TEMPLATES, *[str(rows_file(tmp_path))] * 2, batch_size=4)
    callback = SoftPromptCallback(tasks={task: 3 for task in TEMPLATES})
    found = waits_a_step(tmp_path, CausalLMModule(str(tiny_base)), data, callback, PromptGradientClipping())
    assert sum(found.values()) <= 1, found


def rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = [{"task": task, "text": "it is a film", "label": "film"} for task in TEMPLATES] * 8
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_waits_are_found() -> None:
    values = torch.arange(4)
    with Waits() as waits:
        task_means(values.float(), values, ["a"] * 4)
    assert not waits.places
    prompts = SoftPrompts.for_model(tiny.tiny_model("llama"), {"a": 2})
    with Waits() as waits:
        prompts.check_finite(["a"], torch.float32)  # one of those that ask
    assert sum(waits.places.values()) == 1

"""Attached models and their inputs, and checks of them against the bare model on hard tokens, row by row."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CompileConfig, PreTrainedModel

from lightning_softprompt import SoftPrompts, Tokens, attach
from tests import tiny

PREFIX = "auto"  # the fixture `route` sets another


def hard_prompts(model: nn.Module) -> SoftPrompts:
    return SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()})


def recompute_layers(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on, which transformers before 5.23 knows by its old name alone."""
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on()


def attached(kind: str, logits: str = "all", seed: int = 0) -> tuple[PreTrainedModel, PreTrainedModel, SoftPrompts]:
    """The bare model, and an attached copy."""
    bare = tiny.tiny_model(kind, seed)
    return bare, *attached_copy(bare, PREFIX, logits)


def attached_copy(
    bare: PreTrainedModel, prefix: str = "always", logits: str = "all"
) -> tuple[PreTrainedModel, SoftPrompts]:
    """An attached copy of a bare model, and its prompts."""
    model = copy.deepcopy(bare)
    prompts = hard_prompts(model)
    return attach(model, prompts, prefix=prefix, logits=logits), prompts


def compiled_on_a_cpu(backend: str = "eager", **options: Any) -> CompileConfig:
    """For `generate`, which compiles on accelerators alone, but for transformers' own tests."""
    config = CompileConfig(backend=backend, **options)
    config._compile_all_devices = True
    return config


def inputs(batch: tiny.Batch, labels: bool = False) -> dict[str, Tensor]:
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "task_ids": batch.task_ids}
    return {**rows, "labels": batch.labels} if labels else rows


def generate(model, batch: tiny.Batch, **options: object) -> list[list[int]]:
    out = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids, **options
    )
    times = out.shape[0] // len(batch.rows)
    assert torch.equal(out[:, : batch.input_ids.shape[1]], batch.input_ids.repeat_interleave(times, 0))
    return out[:, batch.input_ids.shape[1] :].tolist()


def mean_loss_of_rows(bare, batch: tiny.Batch) -> float:
    """Mean over all scored tokens of all rows, each row run alone."""
    total, count = 0.0, 0
    for row in batch.rows:
        ids = torch.tensor([row.prompt + row.text])
        with torch.no_grad():
            logits = bare(ids).logits[0].double()
        first = max(len(row.prompt), 1)
        for position in range(first, ids.shape[1]):
            total += float(functional.cross_entropy(logits[position - 1], ids[0, position]))
            count += 1
    return total / count


def assert_rows_equal(bare: PreTrainedModel, batch: tiny.Batch, logits: Tensor) -> None:
    assert logits.shape[:2] == batch.input_ids.shape
    for index, row in enumerate(batch.rows):
        expected = tiny.hard_row(bare, row)
        found = logits.detach()[index, batch.start[index] : batch.start[index] + len(row.text)]
        assert tiny.relative_error(found, expected) < 1e-5, (index, row)


def widths(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Grows by the rows and columns of every pass through the first layer."""
    seen: list[tuple[int, int]] = []
    layer = model.model.layers[0] if hasattr(model, "model") else model.transformer.h[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    return seen


def require_exact(model: nn.Module, bare: nn.Module, forward: nn.Module | None = None) -> SoftPrompts:
    """Logits and greedy tokens of mixed batches are those of the bare base on each row alone, and prompts train."""
    prompts = hard_prompts(model)
    attach(model, prompts)
    for seed, side in ((0, "left"), (1, "right"), (2, "left")):
        batch = tiny.random_batch(seed, side)
        out = (model if forward is None else forward)(**inputs(batch), labels=batch.labels)
        for index, row in enumerate(batch.rows):
            found = out.logits.detach()[index, batch.start[index] : batch.start[index] + len(row.text)]
            assert tiny.relative_error(found, tiny.hard_row(bare, row)) < 1e-5
        out.loss.backward()
    assert all(prompts[task].grad.norm() > 0.1 and prompts[task].dtype == torch.float32 for task in prompts)
    batch = tiny.random_batch(0, "left")
    ids = model.generate(**inputs(batch), max_new_tokens=4, do_sample=False)
    for index, row in enumerate(batch.rows):
        new = ids[index, batch.input_ids.shape[1] :].tolist()
        assert new == tiny.hard_greedy(bare, row, 4, do_sample=False)[0]
    return prompts

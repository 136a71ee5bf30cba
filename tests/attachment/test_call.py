"""Calls that prompts have no place in are refused by name."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError
from tests.attachment.helpers import attached

pytestmark = pytest.mark.usefixtures("route")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_ids": torch.tensor([0, 3])}, "task id 3 is out of range.*0: 'long'"),
        ({"tasks": ["long", "nope"]}, "unknown task 'nope'; known tasks: 'long', 'short', 'one'"),
        ({"tasks": ["long"]}, "1 tasks were given for 2 rows"),
        ({"tasks": "long"}, "a list with one task a row"),
        ({"task_ids": torch.tensor([0.0, 1.0])}, "must be an integer tensor"),
        ({"tasks": ["long"] * 2, "attention_mask": torch.ones(2, 1, 3, 3)}, "four dimensions and packed"),
        ({"tasks": ["long"] * 2, "attention_mask": torch.ones(2, 5)}, r"attention_mask must be \[2, 3\]"),
        ({"tasks": ["long"] * 2, "position_ids": torch.tensor([[0, 1, 0]] * 2)}, "restart inside a row"),
        (
            {"tasks": ["long"] * 2, "token_type_ids": torch.zeros(2, 2, dtype=torch.int64)},
            r"token_type_ids must be \[2, 3",
        ),
        ({"tasks": ["long"] * 2, "ignore_index": 3}, "ignore_index=3 would score prompts"),
        ({"tasks": ["long"] * 2, "mm_token_type_ids": torch.ones(2, 3)}, "mark images or sounds"),
        ({"tasks": ["long"] * 2, "shift_labels": torch.ones(2, 3, dtype=torch.int64)}, "was given shift_labels"),
        ({"tasks": ["long"] * 2, "labels": torch.zeros(2, 2, dtype=torch.int64)}, r"labels must be \[2, 3\]"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_wrong_calls_are_refused_by_name(arguments: dict, message: str) -> None:
    _, model, _ = attached("gpt2")
    with pytest.raises(SoftPromptError, match=message):
        model(torch.tensor([[5, 6, 7], [8, 9, 10]]), **arguments)


def test_as_many_tasks_as_rows_also_in_generate(kind: str) -> None:
    _, model, _ = attached(kind)
    ids = torch.tensor([[5, 6]] * 4)
    for routing in ({"tasks": ["long", "one"]}, {"task_ids": torch.tensor([0])}):
        with pytest.raises(SoftPromptError, match="tasks were given for 4 rows"):
            model.generate(ids, max_new_tokens=1, **routing)
    for call in (model, model.generate):
        with pytest.raises(SoftPromptError, match="both task_ids and tasks are given"):
            call(input_ids=ids, tasks=["long"] * 4, task_ids=torch.tensor([0] * 4))
    with pytest.raises(SoftPromptError, match=r"guidance_scale=1\.5 compares"):
        model.generate(ids, tasks=["long"] * 4, guidance_scale=1.5, max_new_tokens=1)
    for options, named in (
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"prefill_chunk_size": 2, "cache_implementation": "static"}, "prefill_chunk_size"),
    ):
        layers = model.config.num_hidden_layers
        with pytest.raises(SoftPromptError, match=named):
            model.generate(ids, tasks=["long"] * 4, max_new_tokens=1, **options)
        assert (
            model.config.num_hidden_layers == layers and model.generate(ids, tasks=["long"] * 4, max_new_tokens=1).shape
        )
    with pytest.raises(SoftPromptError, match="no columns"):
        model(ids[:, :0], tasks=["long"] * 4)


@pytest.mark.parametrize("tasks", [["long", None], [None, None]])
@pytest.mark.parametrize("wrong", [61, -1])
def test_ids_beyond_the_embedding_are_refused(kind: str, tasks: list, wrong: int) -> None:
    _, model, _ = attached(kind)
    ids = torch.tensor([[5, 6], [7, wrong]])
    with pytest.raises(SoftPromptError, match=f"has token id {wrong}, .* knows the ids from 0 to 60"):
        model(ids, attention_mask=torch.ones_like(ids), tasks=tasks)


def test_arguments_by_position_are_counted_as_python_does(kind: str) -> None:
    _, model, _ = attached(kind)
    ids = torch.tensor([[5, 6]])
    with pytest.raises(SoftPromptError, match="'input_ids' is given twice"):
        model(ids, input_ids=ids, tasks=["one"])
    with pytest.raises(SoftPromptError, match="positional arguments"):
        model(ids, *[None] * 40, tasks=["one"])

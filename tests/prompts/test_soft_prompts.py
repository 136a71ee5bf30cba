"""The prompts of several tasks, and their place in a module."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens


def test_tasks_are_added_removed_and_frozen_one_by_one(model) -> None:
    prompts = SoftPrompts.for_model(model, {"a": 3, "b": 2})
    prompts.add("c", Tokens([5]), model=model)
    prompts.freeze("b")
    assert [t for t in prompts if prompts[t].requires_grad] == ["a", "c"]
    prompts.unfreeze("b")
    prompts.remove("a")
    assert prompts.tasks == ("b", "c") and prompts.task_ids(["c", None, "b"]).tolist() == [1, -1, 0]
    assert len(list(prompts.parameters())) == 2 and "a" not in prompts and len(prompts) == 2
    for call in (lambda: prompts["a"], lambda: prompts.remove("a"), lambda: prompts.task_ids(["a"])):
        with pytest.raises(SoftPromptError, match="unknown task 'a'; known tasks: 'b', 'c'"):
            call()
    with pytest.raises(SoftPromptError, match="there is a task 'b' already"):
        prompts.add("b", torch.zeros(1, 32))
    with pytest.raises(SoftPromptError, match=r"must be \[length, 32\]"):
        prompts.add("d", torch.zeros(1, 31))
    with pytest.raises(SoftPromptError, match="finite"):
        prompts.add("d", torch.full((1, 32), float("nan")))


def test_parameters_stand_in_the_order_of_names(model) -> None:
    one = SoftPrompts.for_model(model, {"b": 2, "a": 3})
    assert [len(p) for p in one.parameters()] == [3, 2] and one.tasks == ("b", "a")
    one.add("Z", Tokens([5]), model=model)
    assert [len(p) for p in one.parameters()] == [1, 3, 2]


def test_casts_are_refused_and_moves_are_not(model) -> None:
    prompts = SoftPrompts.for_model(model, {"a": 3})
    before = prompts["a"].detach().clone()
    parameter = prompts["a"]
    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.float16)):
        cast(torch.nn.Sequential(prompts))
        assert prompts["a"] is parameter and torch.equal(parameter, before) and parameter.dtype == torch.float32
    assert prompts.to("meta")["a"].device.type == "meta"

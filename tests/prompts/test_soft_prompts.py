"""The prompts of several tasks, and their place in a module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate, Tokens
from lightning_softprompt.base.fingerprint import BaseModel


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


def test_a_task_is_renamed_in_place(model) -> None:
    prompts = SoftPrompts.for_model(model, {"b": 2, "a": 3})
    prompt, prompts.templates["b"] = prompts["b"], TaskTemplate("{text}", " {label}")
    prompts.freeze("b")
    prompts.rename("b", "c")
    assert prompts.tasks == ("c", "a") and prompts["c"] is prompt and not prompt.requires_grad
    assert prompts.task_ids(["c", "a"]).tolist() == [0, 1] and [len(p) for p in prompts.parameters()] == [3, 2]
    assert list(prompts.templates) == ["c"] and set(prompts.starts) == {"a", "c"}
    for old, new, message in (("b", "d", "unknown task 'b'"), ("a", "c", "there is a task 'c'"), ("a", "x/y", "x/y")):
        with pytest.raises(SoftPromptError, match=message):
            prompts.rename(old, new)
    assert prompts.tasks == ("c", "a")


def test_a_subset_is_a_copy(model) -> None:
    prompts = SoftPrompts.for_model(model, {"a": 3, "b": 2, "c": 1})
    prompts.templates["b"] = TaskTemplate(labels=[" x"])
    prompts.freeze("c")
    chosen = prompts.subset(["c", "b"])
    assert chosen.tasks == ("c", "b") and torch.equal(chosen["b"], prompts["b"]) and chosen.base == prompts.base
    assert (
        chosen.templates == prompts.templates
        and not chosen["c"].requires_grad
        and chosen.starts["b"] == prompts.starts["b"]
    )
    with torch.no_grad():
        chosen["b"].zero_()
    chosen.templates["b"].labels.append(" y")
    assert prompts["b"].abs().sum() > 0 and prompts.templates["b"].labels == [" x"]


def test_templates_go_with_their_tasks(model) -> None:
    one, other = (SoftPrompts.for_model(model, {task: 2}) for task in ("a", "b"))
    other.templates["b"] = TaskTemplate("{question}")
    one.update(other)
    assert one.templates == other.templates and one.templates["b"] is not other.templates["b"]
    one.remove("b")
    assert not one.templates


def test_values_are_checked_as_they_will_be(model) -> None:
    prompts = SoftPrompts.for_model(model, {"a": 3})
    with pytest.raises(SoftPromptError, match="finite"):
        prompts.add("b", torch.full((1, 32), 1e300, dtype=torch.float64))


def test_prompts_of_another_width_name_the_base_that_they_were_made_for(model) -> None:
    prompts = SoftPrompts(hidden_size=16)
    prompts.add("a", torch.ones(2, 16))
    with pytest.raises(SoftPromptError, match="were made for another base model; load that one"):
        prompts.check_fits(model)
    prompts.base = replace(BaseModel.of(model), name="some/base", hidden_size=16)
    with pytest.raises(SoftPromptError, match=r"are 32; these prompts were made for another base model \(some/base\)"):
        prompts.check_fits(model)

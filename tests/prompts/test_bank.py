"""Prompts as the parameters of a module: found by name, indexed and packed."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens


def test_tasks_go_through_a_model_in_the_order_of_their_names(model) -> None:
    prompts = SoftPrompts.for_model(model, {"z": 2, "a": 3, "m": 1})
    assert prompts.distinct(["z", None, "m", "z", "a"]) == ("a", "m", "z")
    packed, offsets = prompts.packed(["a", "z"])
    assert torch.equal(packed, torch.cat([prompts["a"], prompts["z"]])) and offsets.tolist() == [0, 3, 5]
    assert prompts.packed([])[0].shape == (0, prompts.hidden_size)


def test_gradients_are_wanted_where_a_prompt_trains(model) -> None:
    prompts = SoftPrompts.for_model(model, {"a": 2, "b": 3})
    prompts.freeze("a")
    assert prompts.want_gradients("ab") and not prompts.want_gradients("a") and not prompts.want_gradients("")
    with torch.no_grad():
        assert not prompts.want_gradients("ab")


@pytest.mark.parametrize(
    "value, dtype", [(float("nan"), torch.float32), (float("-inf"), torch.float32), (1e6, torch.float16)]
)
def test_prompts_that_are_not_finite_are_named(model, value: float, dtype: torch.dtype) -> None:
    prompts = SoftPrompts.for_model(model, {"a": 2, "b": Tokens([5])})
    prompts.check_finite(["a", "b", None], dtype)
    with torch.no_grad():
        prompts["b"][0, 3] = value
    prompts.check_finite(["a"], dtype)
    prompts.check_finite([], dtype)
    with pytest.raises(SoftPromptError, match="prompt of task 'b' holds a number that is not finite"):
        prompts.check_finite(["a", "b"], dtype)


def test_a_teacher_is_a_task_that_neither_trains_nor_is_saved(model, tmp_path) -> None:
    prompts = SoftPrompts.for_model(model, {"b": 2, "d": 3})
    names, before = list(dict(prompts.named_parameters())), prompts.state_dict()
    prompts.add("a", Tokens([5, 6, 7, 8]), model=model, teacher=True)
    prompts.add("c", torch.ones(2, prompts.hidden_size), teacher=True)
    hard = model.get_input_embeddings()(torch.tensor([5, 6, 7, 8]))
    assert prompts.tasks == ("b", "d", "a", "c") and prompts.teachers == ("a", "c") and "a" in prompts
    assert prompts.lengths == (2, 3, 4, 2) and torch.equal(prompts["a"], hard)
    packed, offsets = prompts.packed(["a", "b"])
    assert torch.equal(packed, torch.cat([hard, prompts["b"]])) and offsets.tolist() == [0, 4, 6]
    assert not prompts.want_gradients("ac") and prompts.want_gradients("da")
    assert list(dict(prompts.named_parameters())) == names and prompts.state_dict().keys() == before.keys()
    assert not prompts.load_state_dict(before).missing_keys
    prompts.save_pretrained(tmp_path)
    assert SoftPrompts.from_pretrained(tmp_path).tasks == ("b", "d")
    assert [entry.task for entry in prompts.description().entries] == ["b", "d"]


def test_a_teacher_is_moved_copied_renamed_and_removed_as_other_tasks_are(model) -> None:
    prompts = SoftPrompts.for_model(model, {"b": 2})
    prompts.add("a", Tokens([5, 6]), model=model, teacher=True)
    prompts.rename("a", "z")
    assert prompts.tasks == ("b", "z") and prompts.teachers == ("z",)
    assert prompts.bfloat16()["z"].dtype == torch.float32 and prompts.to("meta")["z"].is_meta
    prompts = SoftPrompts.for_model(model, {"b": 2})
    prompts.add("z", Tokens([5, 6]), model=model, teacher=True)
    assert prompts.subset(["z", "b"]).teachers == ("z",) and prompts.subset(["b"]).teachers == ()
    other = SoftPrompts.for_model(model, {"c": 2})
    other.update(prompts)
    assert other.tasks == ("c", "b", "z") and other.teachers == ("z",)
    prompts.remove("z")
    assert prompts.tasks == ("b",) and prompts.teachers == () and "z" not in prompts.starts
    with pytest.raises(SoftPromptError, match="unknown task 'z'"):
        _ = prompts["z"]

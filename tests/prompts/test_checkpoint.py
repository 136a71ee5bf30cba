"""What a checkpoint holds of prompts, and what is said of files that hold none; real runs are in tests/training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate


class Foreign:
    """An object of somebody's own."""


@pytest.fixture
def prompts(model) -> SoftPrompts:
    made = SoftPrompts.for_model(model, {"to.pic": 3, "a%b": 2})
    made.freeze("a%b")
    made.templates["to.pic"] = TaskTemplate("{text}", "{label}", labels=["x", "y"], chat=True, system="s")
    return made


def content_of(prompts: SoftPrompts, path: str = "net.lm") -> dict[str, Any]:
    values = {f"{path}.soft_prompts.{name}": value.detach().clone() for name, value in prompts.named_parameters()}
    return {"state_dict": {"head.weight": torch.ones(2), **values}, "soft_prompts": prompts.description().content()}


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(each) for key, each in value.items())
    return all(map(is_plain, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))


def test_all_of_the_prompts_comes_back(prompts, tmp_path) -> None:
    content = content_of(prompts)
    assert is_plain(content["soft_prompts"])
    torch.save(content, tmp_path / "run.ckpt")
    for found in (SoftPrompts.from_checkpoint(str(tmp_path / "run.ckpt")), SoftPrompts.from_checkpoint(content)):
        assert found.tasks == ("to.pic", "a%b") and found.base == prompts.base and found.starts == prompts.starts
        assert found.templates == prompts.templates
        assert [found[task].requires_grad for task in found] == [True, False]
        assert all(torch.equal(found[task], prompts[task]) for task in prompts)


def test_a_checkpoint_of_0_1_gives_the_values_by_name(prompts) -> None:
    content = content_of(prompts)
    del content["soft_prompts"]
    found = SoftPrompts.from_checkpoint(content)
    assert set(found) == {"to.pic", "a%b"} and found.base is None and found.templates == {}
    assert all(torch.equal(found[task], prompts[task]) for task in prompts)


def test_a_module_that_holds_its_model_twice_has_each_prompt_once(prompts) -> None:
    content = content_of(prompts)
    content["state_dict"] |= content_of(prompts, "alias")["state_dict"]
    assert SoftPrompts.from_checkpoint(content).tasks == prompts.tasks
    content["state_dict"]["alias.soft_prompts.prompt:to%2Epic"] += 1
    with pytest.raises(SoftPromptError, match=r"two prompts of task 'to\.pic'"):
        SoftPrompts.from_checkpoint(content)


def _shards(path: Path) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(b"")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "there is no checkpoint"),
    "shards": (_shards, "as of a checkpoint in shards; save with save_distributed_checkpoint=False"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or no checkpoint"),
    "text": (lambda path: path.write_text("epoch: 3"), "is damaged or no checkpoint"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "is not a checkpoint of Lightning"),
    "weights": (lambda path: torch.save({"weight": torch.ones(2)}, path), "is not a checkpoint of Lightning"),
    "no prompts": (lambda path: torch.save({"state_dict": {"a.b": torch.ones(2)}}, path), "holds no soft prompts"),
    "object": (
        lambda path: torch.save({"state_dict": {}, "x": Foreign()}, path),
        r"run code .*Foreign\); if you trust",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_any_other_file_is_one_clear_line(kind: str, tmp_path) -> None:
    make, message = FILES[kind]
    make(tmp_path / "run.ckpt")
    with pytest.raises(SoftPromptError, match=message) as error:
        SoftPrompts.from_checkpoint(tmp_path / "run.ckpt")
    assert "\n" not in str(error.value) and str(tmp_path / "run.ckpt") in str(error.value)


def test_half_a_file_is_damaged_and_a_folder_of_prompts_is_named(prompts, tmp_path) -> None:
    torch.save(content_of(prompts), tmp_path / "run.ckpt")
    data = (tmp_path / "run.ckpt").read_bytes()
    (tmp_path / "run.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(SoftPromptError, match=r"run\.ckpt is damaged or no checkpoint"):
        SoftPrompts.from_checkpoint(tmp_path / "run.ckpt")
    prompts.save_pretrained(tmp_path / "folder")
    with pytest.raises(SoftPromptError, match=r"use SoftPrompts\.from_pretrained"):
        SoftPrompts.from_checkpoint(tmp_path / "folder")


SPOILT: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "not finite": (lambda entry, values: values[A].fill_(torch.nan), "'a%b' holds NaN or Inf; take an earlier"),
    "no matrix": (lambda entry, values: values.update({A: torch.ones(3)}), "'a%b' is damaged"),
    "a value is missing": (lambda entry, values: values.pop(A), "describes prompts of shapes .* and holds"),
    "a task is not listed": (lambda entry, values: entry["tasks"].pop(), "describes prompts of shapes .* and holds"),
    "a task twice": (lambda entry, values: entry["tasks"].append(entry["tasks"][0]), "holds a task twice"),
    "another width": (
        lambda entry, values: entry.update(hidden_size=31),
        r"shapes .*\[3, 31\].* and holds .*\[3, 32\]",
    ),
    "of later": (
        lambda entry, values: entry.update(format_version=3),
        "format version 3 .* this library reads 1 and 2",
    ),
    "no version": (lambda entry, values: entry.clear(), "does not describe its prompts"),
    "a field of later": (
        lambda entry, values: entry["tasks"][0]["template"].update(more=1),
        "is damaged: the template",
    ),
    "a template": (lambda entry, values: entry["tasks"][0]["template"].update(text="{"), "unbalanced braces"),
    "the base": (lambda entry, values: entry["base_model"].pop("ids"), "is damaged: 'base_model' must have"),
}
SPOILT["an escape"] = (
    lambda entry, values: entry["tasks"][0].update(start="\x1b[2J"),
    r"'start' must not hold control characters, found '\\x1b\[2J'",
)
A = "net.lm.soft_prompts.prompt:a%25b"


@pytest.mark.parametrize("kind", SPOILT)
def test_what_does_not_fit_is_refused(kind: str, prompts) -> None:
    content = content_of(prompts)
    spoil, message = SPOILT[kind]
    spoil(content["soft_prompts"], content["state_dict"])
    with pytest.raises(SoftPromptError, match=message):
        SoftPrompts.from_checkpoint(content)

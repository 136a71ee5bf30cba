"""What may name a task: any text that is no path, through files and modules."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts


@pytest.mark.parametrize("task", ["keys", "v1.0", "情感", "forward", "50%2E", "a b", "prompt:x", "training"])
def test_any_text_names_a_task(model, task: str, tmp_path) -> None:
    prompts = SoftPrompts.for_model(model, {task: 3, "other": 2})
    prompts.save_pretrained(tmp_path)
    again = SoftPrompts.from_pretrained(tmp_path)
    assert again.tasks == (task, "other") and torch.equal(again[task], prompts[task])
    module = torch.nn.ModuleDict({"inner": again})
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    torch.testing.assert_close(again[task], prompts[task] + 1)


@pytest.mark.parametrize("task", ["", "  ", "a/b", "a\\b", "..", "a\nb", "a\0b", 3, None])
def test_names_that_are_refused(model, task) -> None:
    with pytest.raises(SoftPromptError, match="a task name"):
        SoftPrompts.for_model(model, {task: 3})


@pytest.mark.parametrize("task", [False, True, 1])
def test_names_that_yaml_takes_for_something_else_are_told_their_quotes(model, task) -> None:
    with pytest.raises(SoftPromptError, match="put quotes around it: YAML"):
        SoftPrompts.for_model(model, {task: 3})

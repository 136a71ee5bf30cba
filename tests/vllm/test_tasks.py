"""Tests of tasks and of what their prompts make of token ids."""

from __future__ import annotations

import torch
from softprompt_vllm.tasks import Task, mixed_input


def test_the_prompt_stands_in_front_of_the_ids_unchanged() -> None:
    rows, ids = torch.randn(3, 8).to(torch.bfloat16), [9, 0, 4, 4]
    made = mixed_input(rows, ids)
    assert made.embeds.dtype == torch.bfloat16 and made.embeds.shape == (7, 8)
    assert torch.equal(made.embeds[:3], rows) and not made.embeds[3:].any()
    assert made.token_ids == [0, 0, 0, 9, 0, 4, 4]
    assert made.is_token_ids == [False] * 3 + [True] * 4


def test_a_request_cannot_change_the_prompt_of_the_next() -> None:
    rows = torch.ones(2, 4)
    mixed_input(rows, [1]).embeds.zero_()
    assert torch.equal(rows, torch.ones(2, 4))


def test_a_task_has_a_length_and_no_tensor_in_logs() -> None:
    assert Task("tone", torch.ones(3, 4)).length == 3 and Task("tone", (60, 61)).length == 2
    assert repr(Task("tone", torch.ones(3, 4))) == "Task(name='tone', template=None)"

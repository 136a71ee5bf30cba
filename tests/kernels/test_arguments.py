"""What `prompt_concat` refuses, with the name of the argument first."""

from __future__ import annotations

import pytest
import torch
from softprompt_kernels import prompt_concat
from torch import Tensor


def arguments(**changes):
    base = dict(
        embeddings=torch.zeros(2, 3, 4),
        input_ids=None,
        prompts=torch.zeros(5, 4),
        offsets=torch.tensor([0, 2, 5]),
        task_ids=torch.tensor([0, 1]),
        padding_side="left",
        max_prompt_length=3,
    )
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        (dict(embeddings=[1]), TypeError, "embeddings"),
        (dict(embeddings=torch.zeros(2, 3, 4, dtype=torch.int64)), TypeError, "embeddings"),
        (dict(embeddings=torch.zeros(2, 4)), ValueError, "embeddings"),
        (dict(input_ids=torch.zeros(2, 3)), ValueError, "embeddings"),
        (dict(embeddings=torch.zeros(4, 9).T, input_ids=torch.zeros(2, 3).long()), ValueError, "embeddings"),
        (dict(embeddings=torch.zeros(0, 4), input_ids=torch.zeros(2, 3).long()), ValueError, "embeddings"),
        (dict(embeddings=torch.zeros(2, 3, 4).double(), backend="triton"), TypeError, "embeddings"),
        (dict(embeddings=torch.zeros(9, 4), input_ids=torch.zeros(2, 3)), TypeError, "input_ids"),
        (dict(embeddings=torch.zeros(9, 4), input_ids=torch.full((2, 3), 9)), ValueError, "input_ids"),
        (dict(prompts=torch.zeros(5, 3)), ValueError, "prompts"),
        (dict(prompts=torch.zeros(4, 5).T), ValueError, "prompts"),
        (dict(prompts=torch.zeros(5, 4, dtype=torch.int64)), TypeError, "prompts"),
        (dict(prompts=torch.zeros(5, 4).double(), backend="triton"), TypeError, "prompts"),
        (dict(prompts=torch.zeros(5, 4, device="meta")), ValueError, "prompts"),
        (dict(offsets=torch.tensor([0, 3, 2])), ValueError, "offsets"),
        (dict(offsets=torch.tensor([0, 2, 4])), ValueError, "offsets"),
        (dict(offsets=torch.tensor([0.0, 5.0])), TypeError, "offsets"),
        (dict(task_ids=torch.tensor([0, 2])), ValueError, "task_ids"),
        (dict(task_ids=torch.tensor([0, -2])), ValueError, "task_ids"),
        (dict(task_ids=torch.tensor([0])), ValueError, "task_ids"),
        (dict(task_ids=torch.tensor([0.0, 1.0])), TypeError, "task_ids"),
        (dict(attention_mask=torch.ones(2, 3)), TypeError, "attention_mask"),
        (dict(attention_mask=torch.ones(2, 3).to(torch.uint16)), TypeError, "attention_mask"),
        (dict(embeddings=torch.zeros(2, 3, 0), prompts=torch.zeros(5, 0)), ValueError, "embeddings"),
        (dict(attention_mask=torch.ones(2, 4, dtype=torch.int64)), ValueError, "attention_mask"),
        (dict(labels=torch.ones(2, 3)), TypeError, "labels"),
        (dict(labels=torch.ones(3, 2, dtype=torch.int64)), ValueError, "labels"),
        (dict(labels=torch.ones(2, 3, dtype=torch.int64, device="meta")), ValueError, "labels"),
        (dict(padding_side="middle"), ValueError, "padding_side"),
        (dict(mask_form="2d"), ValueError, "mask_form"),
        (dict(backend="cuda"), ValueError, "backend"),
        (dict(max_prompt_length=2), ValueError, "max_prompt_length"),
        (dict(max_prompt_length=-1), ValueError, "max_prompt_length"),
        (dict(max_prompt_length=2.0), TypeError, "max_prompt_length"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes, error, name: str) -> None:
    with pytest.raises(error, match=f"^{name} "):
        prompt_concat(**arguments(**changes))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_vmap_is_refused(backend: str) -> None:
    def embeds(text: Tensor) -> Tensor:
        return prompt_concat(**arguments(embeddings=text, backend=backend)).inputs_embeds

    for function in (embeds, torch.func.grad(lambda text: embeds(text).sum())):
        with pytest.raises(ValueError, match=r"^embeddings .*vmap"):
            torch.vmap(function)(torch.zeros(6, 2, 3, 4))

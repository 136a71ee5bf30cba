"""What earlier parts leave: sums, gradients added in float32, and a mean over the targets of all parts."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError
from lightning_softprompt.attachment.parts import EarlierParts


def test_the_mean_of_all_parts_has_the_gradients_of_all_parts() -> None:
    prompt = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    states = prompt * 3
    leaf = states.detach().requires_grad_()
    earlier = EarlierParts([leaf], [states], None)
    for factor in (1.0, 4.0):
        earlier.add((factor * leaf**2).sum(), torch.tensor(2))
    loss = earlier.mean_with((5.0 * states**2).sum(), torch.tensor(1))
    (loss * 7).backward()
    again = prompt.detach().clone().requires_grad_()
    whole = (10.0 * (again * 3) ** 2).sum() / 5
    (whole * 7).backward()
    assert torch.allclose(loss, whole) and torch.allclose(prompt.grad, again.grad)


def test_gradients_of_many_parts_are_added_in_float32() -> None:
    leaf = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    origin = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    earlier = EarlierParts([leaf], [origin], 1)
    for _ in range(1024):  # in bfloat16 the sum would stop at 256
        earlier.add(leaf.float().sum(), torch.tensor(1))
    earlier.mean_with(origin.float().sum() * 0, torch.tensor(1)).backward()
    assert float(origin.grad) == 1024


def test_a_prompt_without_rows_in_any_part_gets_no_gradient() -> None:
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    earlier = EarlierParts([used, unused], [used, unused], 2)
    earlier.add((used * 3).sum(), torch.tensor(1))
    earlier.mean_with((used * 5).sum(), torch.tensor(1)).backward()
    assert used.grad.tolist() == [4, 4] and unused.grad is None


def test_gradients_of_gradients_are_refused() -> None:
    leaf = torch.ones(2, requires_grad=True)
    earlier = EarlierParts([leaf], [leaf], 2)
    earlier.add((leaf**2).sum(), torch.tensor(1))
    with pytest.raises(SoftPromptError, match="leave micro_batch_size out"):
        torch.autograd.grad(earlier.mean_with((leaf**2).sum(), torch.tensor(1)), leaf, create_graph=True)

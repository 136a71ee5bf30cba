"""What ranks do alike, in two processes that talk over gloo."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from lightning_softprompt.distributed import average_gradients, gathered, has_several_ranks, with_zero_gradients

# What each rank's gradients of two parameters are, and their means.
GRADIENTS = (([[1.0, 2.0], [3.0, 4.0]], [10.0]), ([[5.0, -2.0], [0.0, 8.0]], [-4.0]))
MEANS = ([[3.0, 0.0], [1.5, 6.0]], [3.0])


def of_a_rank(rank: int, folder: Path) -> None:
    """What one of two processes finds goes into a file."""
    where = {"init_method": f"file://{folder / 'ranks'}", "timeout": timedelta(seconds=60)}
    distributed.init_process_group("gloo", world_size=2, rank=rank, **where)
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(1))]
    for parameter, gradient in zip((parameters[0], parameters[2]), GRADIENTS[rank], strict=True):
        parameter.grad = torch.tensor(gradient)
    average_gradients(parameters)
    average_gradients([parameters[1]])  # nothing is there to be averaged
    found: dict[str, Any] = {"several": has_several_ranks()}
    found["gradients"] = [None if each.grad is None else each.grad.tolist() for each in parameters]
    found["values"] = [parameter.tolist() for parameter in parameters]
    found["gathered"] = gathered({"rank": rank, "rows": ["a"] * (rank + 1)})
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(of_a_rank, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_gradients_become_their_means_and_what_has_none_is_left_alone(ranks) -> None:
    for found in ranks:
        assert found["gradients"] == [MEANS[0], None, MEANS[1]]
        assert found["values"] == [[[0.0, 0.0], [0.0, 0.0]], [0.0] * 5, [0.0]]


def test_every_rank_has_the_values_of_all_in_their_order(ranks) -> None:
    for found in ranks:
        assert found["several"]
        assert found["gathered"] == [{"rank": 0, "rows": ["a"]}, {"rank": 1, "rows": ["a", "a"]}]


def test_one_process_gathers_its_own_value() -> None:
    assert not has_several_ranks() and gathered("a") == ["a"]


def test_others_have_gradients_of_zeros_and_the_value_its_own() -> None:
    value = torch.tensor([1.0, -2.0], requires_grad=True)
    others = [nn.Parameter(torch.full((2, 3), 7.0)), nn.Parameter(torch.ones(1, dtype=torch.bfloat16))]
    found = with_zero_gradients(value, others)
    assert found.tolist() == [1.0, -2.0]
    (found * torch.tensor([3.0, 5.0])).sum().backward()
    assert value.grad.tolist() == [3.0, 5.0]
    for other in others:
        assert other.grad.dtype == other.dtype and other.grad.shape == other.shape
        assert other.grad.tolist() == torch.zeros_like(other).tolist()

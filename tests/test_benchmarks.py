"""The peers of the benchmarks do what is claimed of them. Nothing here is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kernel():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import kernel

        yield kernel
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("number", range(6))
def test_the_peers_lay_out_the_same(kernel, number: int) -> None:
    batch = kernel.Batch.of(kernel.SIZES[number], torch.float32, "cpu")
    mine, theirs = kernel.ours(batch), kernel.eager_mixed(batch)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if batch.side == "right":
        peft = kernel.Peft(batch)
        assert peft.agrees_with(mine)
        if len(peft.rows) == 1:
            alone = peft.operations()
            assert all(torch.equal(mine[name], alone[name].to(mine[name].dtype)) for name in alone)
        # And it would be seen if they did not.
        mine["inputs_embeds"][0, 0] += 1
        assert not peft.agrees_with(mine)

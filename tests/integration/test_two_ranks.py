"""Two ranks whose rows are of different tasks, against one process over the rows of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_softprompt import SoftPrompts, cli
from tests import modules
from tests.cli.command_line import overrides
from tests.integration import two_ranks
from tests.integration.two_ranks import TASKS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_base) -> tuple[Path, list[dict[str, Any]]]:
    """What both ranks found, and where they left their checkpoints."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.integration.two_ranks", folder, tiny_base],
        env=environment, timeout=200, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def start() -> SoftPrompts:
    return SoftPrompts.for_model(modules.Plain().model, dict(TASKS))


@pytest.mark.parametrize(
    "way, prefix, accumulated",
    [("auto", "auto", 1), ("never", "never", 1), ("accumulated", "auto", 2), ("sharded", "auto", 1)],
)
def test_prompts_are_those_of_one_process_over_all_rows(
    way: str, prefix: str, accumulated: int, ranks, tmp_path
) -> None:
    alone = two_ranks.fit(tmp_path, None, prefix, accumulate_grad_batches=accumulated)
    one, other = (found[way] for found in ranks[1])
    for task, value in two_ranks.prompts_of(alone).items():
        assert torch.equal(one[task], other[task])
        torch.testing.assert_close(one[task], value, atol=1e-6, rtol=0)
        assert torch.equal(one[task], start()[task]) == (task == "delta")


def test_metrics_are_of_the_rows_of_all_ranks(ranks, tmp_path) -> None:
    alone = two_ranks.fit(tmp_path, None, "auto").seen
    for found in ranks[1]:
        assert len(found["seen"]) == len(found["seen sharded"]) == len(alone) == 2
        for epoch, expected in zip(found["seen"] + found["seen sharded"], alone * 2, strict=True):
            assert epoch["scalars"].keys() == expected["scalars"].keys()
            for metric in ("loss", "area", "words"):
                assert f"val/{metric}/alpha" in epoch["scalars"] and f"val/{metric}/delta" not in epoch["scalars"]
            for name, value in expected["scalars"].items():
                torch.testing.assert_close(epoch["scalars"][name], value, atol=1e-5, rtol=1e-5)
            for task, values in expected["each"].items():
                torch.testing.assert_close(epoch["each"][task].sort()[0], values.sort()[0], atol=1e-5, rtol=1e-5)


def test_metrics_are_computed_again_when_one_rank_alone_had_more_rows(ranks) -> None:
    for found in ranks[1]:
        assert found["twice"] == {"loss/alpha": 1.0, "loss/beta": 3.0, "loss": 2.0, "loss_micro": pytest.approx(11 / 5)}


def test_a_run_of_two_ranks_is_resumed_exactly(ranks) -> None:
    for found in ranks[1]:
        for task in TASKS:
            assert torch.equal(found["resumed"][task], found["auto"][task])
            assert torch.equal(found["resumed sharded"][task], found["sharded"][task])


def test_checkpoints_of_two_ranks_hold_the_prompts_alone(ranks) -> None:
    for name in ("epoch=1.ckpt", "epoch=1-sharded.ckpt"):
        path = ranks[0] / name
        assert path.stat().st_size < 60_000
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert {name.split(":")[1] for name in saved if "prompt:" in name} == set(TASKS)
        assert all("prompt:" in name or "losses" in name for name in saved)


def test_the_commands_write_every_row_once_and_one_folder_of_prompts(ranks, tiny_base, tmp_path, monkeypatch) -> None:
    folder = ranks[0] / "commands"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    monkeypatch.chdir(Path(__file__).parents[2])
    arguments = ["--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path)]
    cli.main(["predict", *arguments])
    expected = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for row in expected:
        row["probabilities"] = pytest.approx(row["probabilities"], rel=1e-5)
    assert rows == expected
    assert len(rows) == 3
    assert SoftPrompts.from_pretrained(folder / "prompts").tasks == ("sentiment", "source")

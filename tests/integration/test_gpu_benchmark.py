"""What benchmarks/gpu.py does on a GPU, on the CPU and on tiny models. Nothing here is timed."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.integration.scripts import benchmark

# transformers 5.23 warns of a name that PEFT 0.21.2 reads.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def gpu():
    with benchmark("gpu") as module:
        yield module


def tables_of(folder: Path, stage: str) -> dict[str, list[dict[str, Any]]]:
    return json.loads((folder / "results.json").read_text())["tables"][stage]


# The rows of the tables that a stage of a GPU has on the CPU, on tiny models.
STAGES = {
    "environment": {"The machine": 9, "Copies": 3},
    "correct": {"The kernels against plain torch": 6},
    "tests": {"The kernels' own tests": 1},
    "kernel": {"The op, forward": 7},
    "waits": {"Waits for the device": 16},
    "train": {"A step in float32: prefix, inline and PEFT": 1, "A training step": 7, "Where a prefix wins": 1},
    "generate": {"Greedy generation": 5, "A token by hand": 2, "Tokens in float32 against each row alone": 1},
    "host": {"Until a call is handed to the device, 1 row of 8 + 16": 4},
    "decode": {"A token with a static cache": 4, "generate with a static cache": 4},
}


@pytest.mark.parametrize("stage", [*list(STAGES)[:-1], pytest.param("decode", marks=pytest.mark.compiles)])
def test_a_stage_for_a_gpu_runs_on_the_cpu_and_keeps_its_rows(gpu, stage: str, tmp_path, capsys, monkeypatch) -> None:
    def once(calls: dict[str, Any], *_: Any, **__: Any) -> dict[str, float]:
        return {name: float(call() is not None) + 1.0 for name, call in calls.items()}

    assert set(STAGES) == set(gpu.STAGES)
    for name in ("gpu_op", "gpu_models"):
        with benchmark(name) as module:
            monkeypatch.setattr(module, "medians_in_turn", once)
    status = gpu.run_stage(gpu.Session(stage, "cpu", True, tmp_path))
    tables = tables_of(tmp_path, stage)
    assert {name: len(rows) for name, rows in tables.items()} == STAGES[stage]
    assert status == 0, tables
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == sum(STAGES[stage].values()) and all(line.startswith(f"{stage}: ") for line in printed)
    pages = (tmp_path / "results.md").read_text()
    assert all(f"### {name}" in pages for name in tables)
    if stage == "generate":
        assert tables["Tokens in float32 against each row alone"][0]["equal, %"] == 100
    if stage == "decode":
        for table in tables.values():
            assert [row.get("tokens as before, %", 100) for row in table] == [100] * 4


def test_stages_for_a_gpu_keep_their_rows_whatever_ends_them(gpu, tmp_path, monkeypatch, capfd) -> None:
    stages = {"environment": gpu.Stage("gpu_op", 500), "host": gpu.Stage("gpu_op", 0.01)}
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    options = argparse.Namespace(device="cpu", quick=True, out=tmp_path, seconds=500)
    assert gpu.run_all(options) == 1
    assert [row["ended"] for row in tables_of(tmp_path, "all")["Stages"]] == ["well", "cut after 0 s"]
    assert len(tables_of(tmp_path, "environment")["Copies"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "log.txt"}
    assert "environment: Copies: MiB read and written 1.0; GB/s" in capfd.readouterr().out
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 501)
    assert gpu.run_all(options) == 1
    assert [row["ended"] for row in tables_of(tmp_path, "all")["Stages"]] == ["not begun: no time is left"] * 2


def test_a_row_that_fails_is_kept_with_its_reason(gpu, tmp_path, capfd) -> None:
    session = gpu.Session("host", "cpu", True, tmp_path)
    with session.row("A table", what="one") as row:
        row["ms"] = 1.23456
    with session.row("A table", what="two") as row:
        row["ms"] = 2.0
        raise RuntimeError("out of\nmemory | or worse")
    assert session.failures == 1
    assert tables_of(tmp_path, "host") == {
        "A table": [
            {"what": "one", "ms": 1.235},
            {"what": "two", "ms": 2.0, "failure": "FAILED: RuntimeError: out of memory / or worse"},
        ]
    }
    assert "RuntimeError" in capfd.readouterr().err
    gpu.Session("host", "cpu", True, tmp_path)  # begins anew
    gpu.Session("train", "cpu", True, tmp_path)
    assert tables_of(tmp_path, "host") == {} == tables_of(tmp_path, "train")


def test_the_op_is_neither_right_nor_timed_where_it_gives_something_else(gpu, monkeypatch) -> None:
    with benchmark("gpu_op") as gpu_op:
        right = gpu_op.prompt_concat
        assert gpu_op.compare(gpu_op.CASES[2], "cpu")["verdict"] == "right"

        def wrong(*args: Any, prompts: torch.Tensor, **more: Any) -> Any:
            out = right(*args, prompts=prompts, **more)
            if prompts.dtype == torch.float64:  # what is right
                return out
            return out._replace(position_ids=out.position_ids + 1, inputs_embeds=out.inputs_embeds * 2)

        monkeypatch.setattr(gpu_op, "prompt_concat", wrong)
        verdict = gpu_op.compare(gpu_op.CASES[2], "cpu")["verdict"]
        assert verdict == "FAILED: forward, gradient of the prompts, gradient of the text"
        batch = gpu_op.peers.Batch.of((2, 3, 8, 2, 1, "right"), torch.float32, "cpu")
        theirs = gpu_op.one_prompt(batch)
        assert "device, us" in gpu_op.timed(lambda: gpu_op.one_prompt(batch), batch, 1e9, "cpu")
        theirs["labels"] = theirs["labels"] + 1
        assert gpu_op.timed(lambda: theirs, batch, 1e9, "cpu") == {"device, us": "FAILED: another result"}


def test_what_a_prefix_saves_and_whether_it_wins(gpu, monkeypatch, tmp_path) -> None:
    seconds = dict(no_prompt=1.0, always=1.5, inline=3.0, ours=1.5, peft=4.0, peft_one_task=3.0)
    with benchmark("gpu_models") as gpu_models:
        base = gpu_models.peers.never_ending(tiny.tiny_model())
        monkeypatch.setattr(gpu_models, "medians_in_turn", lambda calls, *_, **__: {key: seconds[key] for key in calls})
        gpu_models.step(gpu.Session("train", "cpu", True, tmp_path), "tiny", base, (8, 4, 6, 2))
    tables = tables_of(tmp_path, "train")
    assert [row["vs floor"] for row in tables["A training step"][:2]] == [0.7273, 1.091]  # 32 + 12 tokens for 32
    # In the sequence 80 columns, as a prefix 44.
    won = {"saved, % of the columns": 45.0, "never / always": 2.0, "prefix wins": "yes"}
    assert tables["Where a prefix wins"][0].items() >= won.items()


def test_waits_for_a_device_are_counted_by_place(gpu, tmp_path) -> None:
    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

    session = gpu.Session("waits", "cpu", True, tmp_path)
    with benchmark("gpu_models") as gpu_models, gpu_models.waits_of(session) as places:
        for _ in range(2):
            wait()
        warnings.warn("synchronizing is not what this tells", stacklevel=1)
    (place,) = places
    assert places[place] == 2 and place.startswith("integration/test_gpu_benchmark.py:")

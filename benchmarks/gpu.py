"""What one call on a machine with a GPU has to answer in some eight minutes: what is right there, and what it costs.

    python benchmarks/gpu.py STAGE [--quick] [--device cpu|cuda] [--out FOLDER] [--seconds SECONDS]

- environment: the card, the versions, and how fast copies are.
- correct: the kernels against plain torch: bits of the forward pass, gradients against float64, two runs alike.
- tests: the kernels' own tests, compiled for the device in place of interpreted.
- kernel: the op's time on the device without launches, beside a copy of as many bytes and beside its peers.
- waits: the places at which the host waits for the device, in a training step and in `generate`.
- train: a training step beside its peers, and the saved share of columns from which a prefix wins.
- generate: greedy generation beside its peers, and what the host and the device take for a token.
- host: what a call of the op costs the host, where nothing but launches counts.
- decode: a token with a static cache, as it is and compiled into CUDA graphs, by hand and by `generate`.
- all: these in this order, each in a process of its own under a time limit of its own, so that one that fails or hangs
  costs the others nothing; and all of them within SECONDS.

A row is printed as soon as it is known, and is in FOLDER/results.json and FOLDER/results.md from then on: a stage that
is cut loses one row. FOLDER/log.txt has what the stages of `all` wrote to stderr. The status is 1 where a row failed or
a stage did not come to its end.

It needs the packages of the tests, and a clone is enough: `PYTHONPATH=kernels:. python benchmarks/gpu.py all`. Nothing
is downloaded, as models have random weights, made on the device. `--device cpu --quick` tries all of it on tiny models
in less than a minute: ours is plain torch there, and its times tell nothing of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import digits, machine, markdown, option_parser, parsed

LEAST_SECONDS = 20  # a stage that has fewer left does not begin: starting Python and importing takes most of them
SHOWN_OF_THE_LOG = 700  # characters


class Stage(NamedTuple):
    """The module that has a function of the stage's name, and the seconds that it may take."""

    module: str
    seconds: float


STAGES = {
    "environment": Stage("gpu_op", 40),
    "correct": Stage("gpu_op", 90),
    "tests": Stage("gpu_op", 100),
    "kernel": Stage("gpu_op", 110),
    "waits": Stage("gpu_models", 45),
    "train": Stage("gpu_models", 120),
    "generate": Stage("gpu_models", 90),
    "host": Stage("gpu_op", 40),
    "decode": Stage("gpu_models", 180),
}


class Results:
    """The tables of all stages, which lie in a folder after every row, whatever ends the process next."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "results.json"
        self._found: dict[str, Any] = {"machine": {}, "tables": {}}
        if self._path.exists() and not fresh:
            self._found = json.loads(self._path.read_text())

    def begin(self, stage: str, where: dict[str, str]) -> None:
        """Forget the rows of an earlier run of the stage."""
        self._found["machine"] = where
        self._found["tables"][stage] = {}
        self._write()

    def add(self, stage: str, table: str, row: dict[str, Any]) -> None:
        self._found["tables"].setdefault(stage, {}).setdefault(table, []).append(row)
        self._write()
        print(f"{stage}: {table}: {'; '.join(f'{name} {value}' for name, value in row.items())}", flush=True)

    def _write(self) -> None:
        lines = ["# Stages of gpu.py", ", ".join(f"{name} {value}" for name, value in self._found["machine"].items())]
        for stage, tables in self._found["tables"].items():
            lines += [f"## {stage}", *(f"### {name}\n\n{markdown(rows)}" for name, rows in tables.items())]
        for path, text in (
            (self._path, json.dumps(self._found, indent=1)),
            (self._path.with_suffix(".md"), "\n\n".join(lines)),
        ):
            beside = path.with_suffix(path.suffix + ".part")
            beside.write_text(text + "\n")
            os.replace(beside, path)


class Session:
    """What a stage is given: where it runs, how much of it, and where its rows go."""

    def __init__(self, stage: str, device: str, quick: bool, folder: Path) -> None:
        self.stage, self.device, self.has_gpu = stage, device, device == "cuda"
        self.is_small = quick or not self.has_gpu
        self.dtype = torch.bfloat16 if self.has_gpu else torch.float32
        self.failures = 0
        self._results = Results(folder)
        self._results.begin(stage, machine(device))

    @contextlib.contextmanager
    def row(self, table: str, /, **named: Any) -> Iterator[dict[str, Any]]:
        """A row that begins with `named` and is kept when the block ends, with the reason where it fails."""
        row = dict(named)
        try:
            yield row
        except Exception as error:
            traceback.print_exc()
            # One line without what would end a cell of the table.
            said = " ".join(str(error).split()).replace("|", "/")
            row["failure"] = f"FAILED: {type(error).__name__}: {said[:150]}"
        shown = {name: digits(value) if isinstance(value, float) else value for name, value in row.items()}
        self.failures += any(str(value).startswith("FAILED") for value in row.values())
        self._results.add(self.stage, table, shown)

    def synchronize(self) -> None:
        if self.has_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory back that nothing holds any more."""
        gc.collect()
        if self.has_gpu:
            torch.cuda.empty_cache()


def run_stage(session: Session) -> int:
    """One stage in this process; the exit status."""
    # transformers 5.23 warns of a name that PEFT 0.21.2 reads; PEFT, of positions that it drops.
    for message in ("`is_gradient_checkpointing` is deprecated", "Position ids are not supported"):
        warnings.filterwarnings("ignore", message=message)
    stage = getattr(importlib.import_module(STAGES[session.stage].module), session.stage)
    stage(session)
    return int(session.failures > 0)


def run_all(options: argparse.Namespace) -> int:
    """Every stage in a process of its own; the exit status."""
    begin = time.perf_counter()
    Results(options.out, fresh=True).begin("all", {})
    (options.out / "log.txt").write_text("")
    all_ended_well = True
    for name, stage in STAGES.items():
        start = time.perf_counter()
        left = options.seconds - (start - begin)
        if left < LEAST_SECONDS:
            ended = "not begun: no time is left"
        else:
            ended = run_process(name, min(stage.seconds, left), options)
        all_ended_well &= ended == "well"
        row = {"stage": name, "seconds": digits(time.perf_counter() - start), "ended": ended}
        Results(options.out).add("all", "Stages", row)
    print(f"all: tables are in {options.out / 'results.md'}", flush=True)
    return int(not all_ended_well)


def run_process(stage: str, seconds: float, options: argparse.Namespace) -> str:
    """Run a stage in another process; how it ended. Where that was not well, the end of its log is printed."""
    command = [sys.executable, __file__, stage, "--device", options.device, "--out", str(options.out)]
    command += ["--quick"] if options.quick else []
    path = options.out / "log.txt"
    with path.open("ab") as log:
        log.write(f"===== {stage}\n".encode())
        log.flush()
        before = log.tell()
        try:
            status = subprocess.run(command, stderr=log, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            ended = f"cut after {seconds:.0f} s"
        else:
            ended = "well" if status == 0 else f"with status {status}"
    if ended != "well":
        print(path.read_bytes()[before:].decode(errors="replace")[-SHOWN_OF_THE_LOG:], flush=True)
    return ended


def main() -> int:
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="the folder of results (runs/gpu)")
    parser.add_argument("--seconds", type=float, default=500, help="what all of the stages may take (500)")
    options = parsed(parser)
    if options.stage == "all":
        return run_all(options)
    importlib.import_module(STAGES[options.stage].module)
    gc.freeze()  # what was imported would be looked through before each measurement, for a quarter of a second
    return run_stage(Session(options.stage, options.device, options.quick, options.out))


if __name__ == "__main__":
    sys.exit(main())

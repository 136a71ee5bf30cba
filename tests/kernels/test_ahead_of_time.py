"""What the kernels compile to on GPUs that are not there: wide accesses, no atomics, no spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
DTYPES = ("float32", "bfloat16", "float16")
LAUNCHES = ("table", "text", "no mask", "boolean", "additive", "large", "prompt gradient", "text gradient")
pytestmark = pytest.mark.ahead_of_time


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict[str, int]]:
    """From a process that does not interpret; it compiles every launch anew."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, Path(__file__).with_name("ahead_of_time.py"), *TARGETS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(line["target"], line["dtype"], line["launch"]): line for line in lines}


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_assembly(assembly, target: str, dtype: str, launch: str, record_property) -> None:
    found = assembly[target, dtype, launch]
    record_property("registers", found["registers"])
    # With 65,536 registers, a multiprocessor holds at least 4 programs of 128 threads, or 5 of the 64 that sum.
    assert found["registers"] <= (192 if launch == "prompt gradient" else 128), found
    assert found["spills"] == 0 and found.get("local accesses", 0) == 0, found
    assert found["atomics"] == 0, found
    # The hidden dimension moves 16 bytes at a time: as many loads of text as stores, and of float32 prompts as many or
    # twice as many again.
    assert found["stores"] > 0, found
    if launch == "prompt gradient":
        assert found["loads"] > 0, found
    else:
        prompts = {"text gradient": 0}.get(launch, 1 if dtype == "float32" else 2)
        assert found["loads"] == (1 + prompts) * found["stores"], found
    if target.startswith("cuda"):
        assert found["wide machine loads"] == found["loads"] and found["wide machine stores"] == found["stores"], found


def test_every_launch_was_compiled(assembly) -> None:
    assert set(assembly) == {(target, dtype, launch) for target in TARGETS for dtype in DTYPES for launch in LAUNCHES}

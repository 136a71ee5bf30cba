"""What every benchmark shares: its options, the machine, times taken in turn, and the table."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGES = ("torch", "triton", "transformers", "peft", "lightning")
progress = Console(stderr=True)


def parse_options(description: str, plot: bool = False) -> argparse.Namespace:
    """`--quick`, `--device`, `--json`: the options of every benchmark; and `--plot`, of those that draw."""
    parser = option_parser(description)
    parser.add_argument("--json", type=Path, help="write the rows there")
    if plot:
        parser.add_argument("--plot", type=Path, help="draw a PNG there")
    return parsed(parser)


def option_parser(description: str) -> argparse.ArgumentParser:
    """Of `--quick` and `--device`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the small sizes alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, of a device that is there."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def machine(device: str) -> dict[str, str]:
    """The processor or card, and the versions of what was run."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"device": name, "threads": str(torch.get_num_threads()), "python": platform.python_version(), **versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def medians_in_turn(calls: Mapping[str, Callable[[], Any]], device: str, repeats: int = 9) -> dict[str, float]:
    """The median time of each call in seconds: all are warmed up, then run in turn, `repeats` times round.

    A sample is as many calls as take ten milliseconds, so that neither the clock nor a first call shows; calls of over
    a fifth of a second are taken five times. On a GPU a sample lies between two events.
    """
    counts = {}
    for name, call in calls.items():
        first = min(_sample(call, 1, device) for _ in range(2))
        counts[name] = max(1, min(1000, int(1e-2 / (first if first > 5e-3 else _sample(call, 3, device)))))
        if first > 0.2:
            repeats = 5
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, call in calls.items():
                samples[name].append(_sample(call, counts[name], device))
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in samples.items()}


def second_time(call: Callable[[], Any], device: str) -> float:
    """The time in seconds of a call that is too long to be repeated, behind another one to warm up."""
    _sample(call, 1, device)
    return _sample(call, 1, device)


def _sample(call: Callable[[], Any], count: int, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


class LiveMemory(TorchDispatchMode):
    """Operators, and the most memory that their outputs held at once.

    What was there before, such as the weights, is not counted, nor is a view of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.now = self.peak = 0
        self.live: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and not tensor.is_mkldnn:  # packed weights, which have no storage to ask
                self._note(tensor.untyped_storage(), counted=False)
        result = function(*args, **(kwargs or {}))
        self.operators += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any, counted: bool = True) -> None:
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = storage.nbytes() if counted else 0
        self.now += self.live[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key)


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """The most bytes of tensors that a call holds at once, beside what was there before."""
    gc.collect()
    if device == "cpu":
        with LiveMemory() as memory:
            result = call()
        del result
        return memory.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def digits(value: float) -> float:
    """Four of them: what a table shows of a time, and a file keeps."""
    return float(f"{value:.4g}")


def keep_freed_memory(keep: bool) -> None:
    """Let the C library keep what is freed, as the allocators of GPUs do; or not, its default.

    By default it returns blocks of megabytes to the system at once, and the next call waits for the system to fill new
    ones with zeros: with large outputs that is most of the time, of every peer. Blocks of gigabytes cannot be kept.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        most_mapped_blocks, trim_threshold = -4, -1
        library.mallopt(most_mapped_blocks, 0 if keep else 65536)
        library.mallopt(trim_threshold, -1 if keep else 2**17)


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a device copy reads and writes, of 1 GiB each way."""
    source = torch.empty(2**28, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = medians_in_turn({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / seconds


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; columns are the keys of all rows, in the order they first come up."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def report(title: str, tables: Mapping[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Print the machine and the tables; write them as JSON where asked."""
    where = machine(options.device)
    print(f"# {title}\n\n{', '.join(f'{name} {value}' for name, value in where.items())}")
    for name, rows in tables.items():
        print(f"\n## {name}\n\n{markdown(rows)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": where, "tables": tables}, indent=1) + "\n")
        progress.print(f"rows written to {options.json}")

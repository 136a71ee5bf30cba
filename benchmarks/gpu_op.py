"""The stages of gpu.py that look at the op alone: environment, correct, tests, kernel, host."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import kernel as peers
import torch
from measure import machine, medians_in_turn, peak_memory, second_time
from softprompt_kernels import prompt_concat
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from gpu import Session

COPIES = (2**16, 2**20, 2**24, 2**27, 2**32)  # bytes read and written

# As in kernel.py. Rows that are padded on the left come last, as they differ little.
SIZES = [
    (1, 16, 576, 8, 1, "right"),
    (16, 128, 576, 20, 4, "right"),
    (32, 512, 2048, 100, 16, "right"),
    (64, 2048, 4096, 100, 64, "right"),
    (64, 2048, 4096, 8, 1, "right"),
    (16, 128, 576, 20, 4, "left"),
    (32, 512, 2048, 100, 16, "left"),
]
SAME_GRADIENT = 1e-5  # relative, of sums in float32 against sums in float64


class Case(NamedTuple):
    """A call whose results are compared. `mask` is a dtype, or None; `table` tells whether ids are looked up."""

    dtype: torch.dtype
    side: str
    mask: torch.dtype | None
    form: str
    table: bool
    labels: bool
    batch: int
    length: int
    hidden: int
    longest: int
    tasks: int


CASES = [
    Case(torch.bfloat16, "left", torch.int64, "padding", True, True, 7, 33, 576, 20, 3),
    Case(torch.bfloat16, "right", torch.int64, "padding", True, True, 7, 33, 576, 20, 3),
    Case(torch.bfloat16, "right", torch.bool, "boolean", False, True, 5, 40, 576, 20, 3),
    Case(torch.bfloat16, "left", torch.int32, "additive", True, False, 5, 40, 4096, 9, 2),
    Case(torch.float16, "left", torch.bool, "padding", False, True, 3, 700, 100, 130, 5),
    Case(torch.float32, "left", torch.uint8, "boolean", True, True, 4, 600, 96, 33, 4),
    Case(torch.float16, "right", None, "additive", True, True, 4, 17, 64, 8, 1),
    Case(torch.float32, "right", torch.int64, "padding", False, False, 130, 20, 2048, 100, 64),
    Case(torch.bfloat16, "right", None, "padding", False, True, 1, 1, 8, 1, 1),
    Case(torch.bfloat16, "right", torch.int64, "padding", True, True, 600, 16, 128, 20, 1),  # sums in parts
    Case(torch.bfloat16, "left", torch.int64, "padding", True, True, 64, 2048, 1024, 100, 64),
]
QUICK = 6


def environment(session: Session) -> None:
    import lightning_softprompt

    found = {**machine(session.device), "lightning_softprompt": lightning_softprompt.__version__}
    if session.has_gpu:
        card = torch.cuda.get_device_properties(0)
        found |= {"multiprocessors": card.multi_processor_count, "compute capability": f"{card.major}.{card.minor}"}
        found |= {"L2, MiB": card.L2_cache_size / 2**20, "memory, GiB": card.total_memory / 2**30}
    for name, value in found.items():
        with session.row("The machine", what=name, value=value):
            pass
    for count in COPIES[:3] if session.is_small else COPIES:
        with session.row("Copies", **{"MiB read and written": count / 2**20}) as row:
            row["GB/s"] = copy_rate(count, session.device) / 1e9


def correct(session: Session) -> None:
    for case in CASES[:QUICK] if session.is_small else CASES:
        named = {name: str(value).removeprefix("torch.") for name, value in case._asdict().items()}
        with session.row("The kernels against plain torch", **named) as row:
            row.update(compare(case, session.device))
        session.free()


def compare(case: Case, device: str) -> dict[str, Any]:
    """Two runs of the backend that serves the device, against plain torch whose gradients are summed in float64."""
    text, prompts, arguments = inputs_of(case, device)
    width = case.longest + case.length
    gradient = torch.randn(case.batch, width, case.hidden, device=device, dtype=case.dtype)

    def run(backend: str, prompts: Tensor) -> tuple[Any, Tensor | None, Tensor | None]:
        prompts = prompts.clone().requires_grad_()
        embeddings = text.clone().requires_grad_(not case.table)
        out = prompt_concat(embeddings, prompts=prompts, **arguments, backend=backend)
        out.inputs_embeds.backward(gradient)
        return out, prompts.grad, embeddings.grad

    backend = "triton" if device == "cuda" else "reference"
    mine, again, expected = run(backend, prompts), run(backend, prompts), run("reference", prompts.double())
    assert mine[1] is not None and again[1] is not None and expected[1] is not None
    difference = float((mine[1] - expected[1]).norm() / expected[1].norm().clamp(min=1e-30))
    holds = {
        "forward": all(map(same, mine[0], expected[0])),
        "two runs": same(mine[1], again[1]) and same(mine[2], again[2]),
        "gradient of the prompts": difference < SAME_GRADIENT,
        "gradient of the text": same(mine[2], expected[2]),
    }
    wrong = [name for name, is_right in holds.items() if not is_right]
    return {"gradient, relative": difference, "verdict": f"FAILED: {', '.join(wrong)}" if wrong else "right"}


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def inputs_of(case: Case, device: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Text, prompts, and the other arguments: rows with pads and holes, of tasks of any length and of none."""
    torch.manual_seed(0)
    lengths = torch.randint(1, case.longest + 1, (case.tasks,))
    ids = torch.randint(0, 500, (case.batch, case.length), device=device)
    pads = torch.randint(0, case.length + 1, (case.batch, 1), device=device)
    column = torch.arange(case.length, device=device)
    mask = torch.rand(case.batch, case.length, device=device) > 0.2
    mask &= column >= pads if case.side == "left" else column < pads
    rows = (500,) if case.table else (case.batch, case.length)
    text = torch.randn(*rows, case.hidden, device=device, dtype=case.dtype)
    prompts = torch.randn(int(lengths.sum()), case.hidden, device=device)
    arguments = dict(
        input_ids=ids if case.table else None,
        offsets=functional.pad(lengths.cumsum(0), (1, 0)).to(device),
        task_ids=torch.randint(-1, case.tasks, (case.batch,), device=device),
        attention_mask=None if case.mask is None else mask.to(case.mask),
        labels=ids if case.labels else None,
        padding_side=case.side,
        max_prompt_length=case.longest,
        mask_form=case.form,
    )
    return text, prompts, arguments


def tests(session: Session) -> None:
    """A row of pytest's last line, and of the tests that failed. A small session takes those of the arguments alone."""
    root = Path(__file__).parents[1]
    what = "tests/kernels/test_arguments.py" if session.is_small else "tests/kernels"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", "--tb=no", what]
    with session.row("The kernels' own tests", what=what) as row:
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
        lines = ran.stdout.strip().splitlines()
        row["outcome"] = lines[-1].strip("= ") if lines else ran.stderr.strip()[-200:]
        failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
        row["verdict"] = "right" if ran.returncode == 0 else f"FAILED: {', '.join(failed) or 'no test ran'}"


def kernel(session: Session) -> None:
    for size in [size for size in SIZES if size[2] == 576] if session.is_small else SIZES:
        batch = peers.Batch.of(size, session.dtype, session.device)
        named = dict(zip(("B", "L", "H", "P", "tasks", "pads"), size, strict=True))
        rate = copy_rate(peers.minimal_bytes(batch), session.device)
        with torch.no_grad():
            for what, call in calls_of(batch, size, session).items():
                with session.row("The op, forward", **named, what=what) as row:
                    row.update(timed(call, batch, rate, session.device))
            if session.has_gpu:
                with session.row("The op, backward", **named) as row:
                    row.update(timed_backward(batch, session.device))
        del batch, call
        if not session.is_small:
            torch._dynamo.reset()  # compiled functions of one size
        session.free()


def calls_of(batch: peers.Batch, size: tuple[Any, ...], session: Session) -> dict[str, Callable[[], peers.Outputs]]:
    calls: dict[str, Callable[[], peers.Outputs]] = {
        "prompt_concat": lambda: peers.ours(batch),
        "eager, mixed": lambda: peers.eager_mixed(batch),
    }
    if size[4] == 1:
        calls["PEFT's operations"] = lambda: one_prompt(batch)
    if batch.side == "right" and not session.is_small:  # compiling takes seconds
        compiled = torch.compile(peers.eager_mixed, dynamic=False)
        calls["torch.compile of eager"] = lambda: compiled(batch)
    return calls


def one_prompt(batch: peers.Batch) -> peers.Outputs:
    """PEFT's operations for one prompt in all rows.

    What PEFT copies from the host is made on the device here, as a CUDA graph takes no such copy.
    """
    rows, device = len(batch.ids), batch.ids.device
    tokens = torch.arange(batch.longest, device=device).expand(rows, -1)
    prompts = functional.embedding(tokens, batch.prompts).to(batch.table.dtype)
    ones = torch.ones(rows, batch.longest, device=device)
    ignored = torch.full((rows, batch.longest), -100, device=device)
    return dict(
        inputs_embeds=torch.cat((prompts, functional.embedding(batch.ids, batch.table)), 1),
        attention_mask=torch.cat((ones, batch.mask), 1),
        labels=torch.cat((ignored, batch.labels), 1),
    )


def timed(call: Callable[[], peers.Outputs], batch: peers.Batch, rate: float, device: str) -> dict[str, Any]:
    """Times of a call of a peer, and what they come to beside a copy; a failure where it gives something else."""
    mine, theirs = peers.ours(batch), call()
    if not all(torch.equal(mine[name], theirs[name].to(mine[name].dtype)) for name in theirs):
        return {"device, us": "FAILED: another result"}
    del mine, theirs
    seconds = device_seconds(call, device)
    per_second = peers.minimal_bytes(batch) / seconds
    return {
        "device, us": seconds * 1e6,
        "needed GB/s": per_second / 1e9,
        "of a copy, %": 100 * per_second / rate,
        "with launches, us": medians_in_turn({"call": call}, device)["call"] * 1e6,
        "peak, MB": peak_memory(call, device) / 1e6,
    }


def timed_backward(batch: peers.Batch, device: str) -> dict[str, Any]:
    """Times of the kernel that sums the gradients of the prompts."""
    operators = torch.ops.softprompt_kernels
    embeds, *_, spans = operators.prompt_concat(*operands(batch), batch.side == "left", batch.longest, "padding")
    gradient = torch.randn_like(embeds)
    del embeds
    rows, hidden = batch.prompts.shape
    # It reads the gradient of each row's prompt, and writes a number of four bytes for each of the prompts'.
    needed = int(batch.offsets.diff()[batch.task_ids].sum()) * hidden * gradient.element_size() + rows * hidden * 4

    def call() -> Tensor:
        return operators.prompt_gradient(gradient, spans, batch.offsets, batch.task_ids, rows)

    seconds, rate = device_seconds(call, device), copy_rate(needed, device)
    return {
        "device, us": seconds * 1e6,
        "needed GB/s": needed / seconds / 1e9,
        "of a copy, %": 100 * needed / seconds / rate,
    }


def operands(batch: peers.Batch) -> list[Tensor]:
    """The tensors of the operator, in its order."""
    return [batch.table, batch.ids, batch.prompts, batch.offsets, batch.task_ids, batch.mask, batch.labels]


def host(session: Session) -> None:
    size = (1, 16, 576, 8, 1, "right")
    batch = peers.Batch.of(size, session.dtype, session.device)
    calls: dict[str, Callable[[], Any]] = {
        "prompt_concat, prompts train": lambda: peers.ours(batch),
        "prompt_concat": lambda: peers.ours(batch),
        "eager, mixed": lambda: peers.eager_mixed(batch),
        "PEFT's operations": lambda: one_prompt(batch),
    }
    if session.has_gpu:
        from softprompt_kernels import triton_concat

        rest = False, batch.longest, "padding"
        compiled = torch.compile(peers.eager_mixed, dynamic=False)
        calls |= {
            "the operator of prompt_concat alone": lambda: torch.ops.softprompt_kernels.prompt_concat(
                *operands(batch), *rest
            ),
            "its launcher alone": lambda: triton_concat.concat(*operands(batch), *rest),
            "its outputs alone": lambda: triton_concat.outputs(
                batch.table, batch.ids, batch.mask, batch.labels, *rest[1:]
            ),
            "torch.compile of eager": lambda: compiled(batch),
        }
    for what, call in calls.items():
        with (
            session.row("Until a call is handed to the device, 1 row of 8 + 16", what=what) as row,
            torch.set_grad_enabled(what.endswith("train")),
        ):
            row["host, us"] = host_seconds(call, session) * 1e6


def host_seconds(call: Callable[[], Any], session: Session) -> float:
    """Seconds until a call has been handed to the device, not until it is done."""
    count = 50 if session.is_small else 200
    for _ in range(20):
        call()
    times = []
    for _ in range(5):
        session.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count)
    session.synchronize()
    return statistics.median(times)


def device_seconds(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call on the device, without gaps between launches: a CUDA graph of several calls is replayed.

    On the CPU, the seconds of the call. One that waits for the device, or copies from the host, cannot be captured.
    """
    if device == "cpu":
        return medians_in_turn({"call": call}, device)["call"]
    graph, count = captured(call)
    return medians_in_turn({"replay": graph.replay}, device)["replay"] / count


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of some two milliseconds of calls, and how many these are."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # left by this block, too, where a capture fails and does not leave it
        for _ in range(3):
            call()
        count = max(1, min(50, int(2e-3 / second_time(call, "cuda"))))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                call()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, count


def copy_rate(count: int, device: str) -> float:
    """Bytes a second of a copy that reads and writes `count` bytes in all."""
    source = torch.randn(max(count // 8, 64), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source), device)

"""Serving many tasks from one model: our server beside whole batches, and beside vLLM with soft prompts and with LoRA.

    python benchmarks/serving.py [--quick] [--vllm PYTHON] [--json PATH]

SmolLM2-135M in float32, prompts of 32 virtual tokens, texts of 8 to 24 tokens, greedy answers of exactly as many tokens
as are asked for. Every peer has one thread for its matrix products. Servers are asked through OpenAI's own client on
this machine, whose work shares the processor.

- serve: `lightning-softprompt serve`, whose rows join and leave at each step.
- whole batches: a thread that takes all requests that wait and answers them with `MixedTaskGenerator.generate`.
- vLLM: its own server with `softprompt-vllm`; vLLM, LoRA: with an adapter of rank 8 a task, of random values. Only with
  `--vllm`, the Python of an environment that has both, as `make test-vllm` leaves it.

Processor seconds are those of a server and its children; for whole batches those of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import peers
import torch
from measure import digits, option_parser, parsed, progress, report
from peft import LoraConfig, get_peft_model
from served import Peer, ours, vllm, vllm_lora, whole_batches

from lightning_softprompt import MixedTaskGenerator, SoftPrompts, Tokens

TASKS, LENGTH, LORA_TASKS, RANK = 64, 32, 8, 8
Row = dict[str, Any]
Paths = tuple[Path, Path, dict[str, Path]]  # of the base, the prompts, and the adapters


class Texts:
    """Requests drawn from a text: the task and the words of each."""

    def __init__(self, tokenizer: Any, stream: list[int]) -> None:
        self._tokenizer, self._stream, self._draw = tokenizer, stream, random.Random(0)

    def draw(self, tasks: int) -> tuple[str, str]:
        """A request of one of so many tasks."""
        length = self._draw.randint(8, 24)
        begin = self._draw.randrange(len(self._stream) - length)
        return f"task{self._draw.randrange(tasks)}", self._tokenizer.decode(self._stream[begin : begin + length])


async def timed(call: Coroutine[Any, Any, int]) -> float:
    """The seconds until an answer is there."""
    start = time.perf_counter()
    await call
    return time.perf_counter() - start


async def together(peer: Peer, texts: Texts, rows: int, tasks: int, count: int, times: int = 1) -> Row:
    """Rows that all come at once; the medians over so many times, each of other rows."""
    found = [await once_together(peer, texts, rows, tasks, count) for _ in range(times)]
    cpu, wall = (statistics.median(each) for each in zip(*found, strict=True))
    return {
        "rows x new tokens": f"{rows} x {count}",
        "CPU seconds": digits(cpu),
        "seconds": digits(wall),
        "tokens a second": digits(rows * count / wall),
    }


async def once_together(peer: Peer, texts: Texts, rows: int, tasks: int, count: int) -> tuple[float, float]:
    """The processor's seconds and those of the clock."""
    asked = [texts.draw(tasks) for _ in range(rows)]
    cpu, start = peer.cpu_seconds(), time.perf_counter()
    await asyncio.gather(*(peer.ask(task, text, count) for task, text in asked))
    return peer.cpu_seconds() - cpu, time.perf_counter() - start


async def short_beside_long(peer: Peer, texts: Texts, tasks: int, short: int, long: int) -> Row:
    """Requests of 2 tokens, one after the other, beside four clients whose answers have `long` tokens."""
    is_over = asyncio.Event()

    async def client() -> None:
        while not is_over.is_set():
            await peer.ask(*texts.draw(tasks), long)

    others = [asyncio.create_task(client()) for _ in range(4)]
    await asyncio.sleep(0.5)
    times = [await timed(peer.ask(*texts.draw(tasks), 2)) for _ in range(short)]
    is_over.set()
    await asyncio.gather(*others)
    return {"median, s": digits(statistics.median(times)), "slowest, s": digits(max(times))}


async def load(peer: Peer, texts: Texts, clients: int, tasks: int, requests: int, count: int = 16) -> Row:
    """Clients that ask again as soon as they are answered."""
    times: list[float] = []

    async def client() -> None:
        for _ in range(requests):
            times.append(await timed(peer.ask(*texts.draw(tasks), count)))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    wall = time.perf_counter() - start
    last = statistics.quantiles(times, n=100)[-1] if len(times) > 1 else times[0]
    return {
        "clients": clients,
        "tasks": tasks,
        "tokens a second": digits(len(times) * count / wall),
        "median, s": digits(statistics.median(times)),
        "99th percentile, s": digits(last),
    }


async def alone(peer: Peer, texts: Texts, requests: int, count: int) -> list[float]:
    """The seconds of requests that come one after the other."""
    return [await timed(peer.ask(*texts.draw(8), count)) for _ in range(requests)]


def generate_alone(base: Path, prompts: Path, texts: Texts, requests: int, count: int) -> list[float]:
    """The seconds of `generate` for the same, without a server."""
    torch.set_num_threads(1)
    generator, times = MixedTaskGenerator.from_pretrained(base, prompts), []
    for _ in range(requests):
        task, text = texts.draw(8)
        start = time.perf_counter()
        generator.generate([text], [task], max_new_tokens=count, min_new_tokens=count)
        times.append(time.perf_counter() - start)
    return times


def folders(base: Any, stream: list[int], tokenizer: Any, folder: Path) -> Paths:
    """The base, prompts and adapters as they lie on a disk."""
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    starts = {f"task{task}": Tokens(stream[7 * task : 7 * task + LENGTH]) for task in range(TASKS)}
    SoftPrompts.for_model(base, starts).save_pretrained(folder / "prompts")
    adapters = {}
    for task in list(starts)[:LORA_TASKS]:
        adapted = get_peft_model(peers.twin(base), LoraConfig(r=RANK, task_type="CAUSAL_LM"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        adapted.save_pretrained(folder / task)
        adapters[task] = folder / task
    return folder / "base", folder / "prompts", adapters


@contextlib.asynccontextmanager
async def started(name: str, python: str | None, paths: Paths) -> AsyncIterator[Peer]:
    """A peer, warm."""
    base, prompts, adapters = paths
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with contextlib.AsyncExitStack() as stack:
        if name == "whole batches":
            peer: Peer = stack.enter_context(whole_batches(base, prompts))
        elif name == "serve":
            peer = await stack.enter_async_context(ours(base, prompts, port))
        elif name == "vLLM":
            peer = await stack.enter_async_context(vllm(str(python), base, prompts, port))
        else:
            peer = await stack.enter_async_context(vllm_lora(str(python), base, adapters, port))
        yield peer


async def measured(options: Any, paths: Paths, make: Callable[[], Texts]) -> dict[str, list[Row]]:
    """All tables."""
    quick = options.quick
    count, requests = (8, 4) if quick else (32, 9)
    sizes = [(1, 1), (4, 8)] if quick else [(1, 1), (4, 8), (16, 8), (16, 64), (64, 8), (64, 64)]
    tables: dict[str, list[Row]] = {
        name: [] for name in ("Rows that come at once", "Short beside long", "One request alone", "Under load")
    }
    plain = statistics.median(generate_alone(*paths[:2], make(), requests, count)[1:])
    tables["One request alone"].append({"what": "generate, no server", "median, s": digits(plain)})
    for name in ("serve", "whole batches", *(("vLLM", "vLLM, LoRA") if options.vllm else ())):
        progress.print(name)
        async with started(name, options.vllm, paths) as peer:
            await together(peer, make(), 8, 8, 4)  # warm
            few = [(8, 4)] if quick else [(32, 2), (32, 32)]
            for rows, new in few:
                await together(peer, make(), rows, 8, new)  # every peer keeps what it can of the prompts
                row = await together(peer, make(), rows, 8, new, 1 if quick else 5)
                tables["Rows that come at once"].append({"what": name, **row})
            tables["Short beside long"].append(
                {"what": name, **await short_beside_long(peer, make(), 8, 3 if quick else 15, 16 if quick else 128)}
            )
            median = statistics.median((await alone(peer, make(), requests, count))[1:])
            row = {"what": name, "median, s": digits(median), "of generate": digits(median / plain)}
            tables["One request alone"].append(row)
            for clients, tasks in sizes:
                if tasks <= (LORA_TASKS if name == "vLLM, LoRA" else TASKS):
                    row = await load(peer, make(), clients, tasks, 1 if quick else max(2, 32 // clients))
                    tables["Under load"].append({"what": name, **row})
    return tables


def main() -> None:
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python of an environment with vLLM and softprompt-vllm")
    options = parsed(parser)
    if options.device != "cpu":
        sys.exit("this benchmark compares servers on the CPU; give --device cpu")
    base, tokenizer = peers.load_base("cpu")
    stream = tokenizer((peers.ROOT / "LICENSE").read_text()).input_ids
    with tempfile.TemporaryDirectory() as folder:
        paths = folders(base, stream, tokenizer, Path(folder))
        tables = asyncio.run(measured(options, paths, lambda: Texts(tokenizer, stream)))
    report("Many tasks served from one model", tables, options)


if __name__ == "__main__":
    main()

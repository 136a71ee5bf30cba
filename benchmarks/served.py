"""The peers of the serving benchmark: servers in processes of their own, and whole batches in this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from measure import progress
from openai import APIError, AsyncOpenAI

from lightning_softprompt import MixedTaskGenerator

PATIENCE = 300.0  # seconds until a server has to answer


class Peer(Protocol):
    """What answers: a text of a task goes in, and so many tokens come out."""

    async def ask(self, task: str, text: str, count: int) -> int:
        """The number of new tokens of the answer."""

    def cpu_seconds(self) -> float:
        """What the peer has used of processors until now, in seconds."""


@dataclass
class Server:
    """A server in a process of its own, asked through OpenAI's own client.

    Attributes:
        client: speaks to it.
        process: the server, which may have children.
        extra: arguments that OpenAI does not know, for an answer of exactly so many tokens.
    """

    client: AsyncOpenAI
    process: psutil.Process
    extra: dict[str, Any] = field(default_factory=dict)

    async def ask(self, task: str, text: str, count: int) -> int:
        answer = await self.client.completions.create(
            model=task, prompt=text, max_tokens=count, temperature=0.0, extra_body={"min_tokens": count, **self.extra}
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    def cpu_seconds(self) -> float:
        total = 0.0
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:2])
        return total


@contextlib.asynccontextmanager
async def served(command: list[str], port: int, environment: dict[str, str], **extra: Any) -> AsyncIterator[Server]:
    """Start a server on `port` of this machine, and end it.

    Raises:
        RuntimeError: a server that ends, or does not answer in time; with the end of what it printed.
    """
    told = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    told |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**told, **environment}, start_new_session=True)
        try:
            start = time.monotonic()
            options = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "timeout": 600, "max_retries": 0}
            async with AsyncOpenAI(**options) as client:
                while not await _is_there(client):
                    if process.poll() is not None or time.monotonic() - start > PATIENCE:
                        log.seek(0)
                        raise RuntimeError(f"{' '.join(command[:4])} … does not serve: {log.read()[-2000:]}")
                    await asyncio.sleep(0.2)
                yield Server(client, psutil.Process(process.pid), extra)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)


async def _is_there(client: AsyncOpenAI) -> bool:
    try:
        await client.models.list()
    except APIError:
        return False
    return True


class WholeBatches:
    """What one has without continuous batching: a thread that takes all that wait, and answers them to the end.

    The rows of a batch end together, with the longest of them.
    """

    def __init__(self, generator: MixedTaskGenerator) -> None:
        self._generator = generator
        self._waiting: list[tuple[str, str, int, asyncio.Future[int]]] = []
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def ask(self, task: str, text: str, count: int) -> int:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._waiting.append((task, text, count, future))
            self._changed.notify()
        return await future

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._is_open and not self._waiting:
                    self._changed.wait()
                batch, self._waiting = self._waiting, []
            if not batch:
                return
            tasks, texts, counts, futures = zip(*batch, strict=True)
            most = max(counts)
            self._generator.generate(list(texts), list(tasks), max_new_tokens=most, min_new_tokens=most)
            for count, future in zip(counts, futures, strict=True):
                future.get_loop().call_soon_threadsafe(future.set_result, count)


@contextlib.contextmanager
def whole_batches(base: Path, prompts: Path) -> Iterator[WholeBatches]:
    """Whole batches in this process, on one thread of torch, as the servers have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    peer = WholeBatches(MixedTaskGenerator.from_pretrained(base, prompts))
    try:
        yield peer
    finally:
        peer.close()
        torch.set_num_threads(before)


def ours(base: Path, prompts: Path, port: int) -> Any:
    """`lightning-softprompt serve`."""
    command = [
        sys.executable,
        "-m",
        "lightning_softprompt.cli",
        "serve",
        "--base",
        str(base),
        "--prompts",
        str(prompts),
    ]
    return served([*command, "--port", str(port), "--max_rows", "64"], port, {})


def vllm(python: str, base: Path, prompts: Path, port: int, block: int = 32) -> Any:
    """The server of vLLM with `softprompt-vllm`, in the virtual environment of `python`."""
    options = ["--enable-prompt-embeds", "--block-size", str(block)]
    told = {"VLLM_PLUGINS": "softprompt", "SOFTPROMPT_FOLDER": str(prompts)}
    progress.print("vLLM starts, which takes a minute")
    return served([*_vllm(python, base, port), *options], port, told, ignore_eos=True)


def vllm_lora(python: str, base: Path, adapters: dict[str, Path], port: int) -> Any:
    """The server of vLLM with a LoRA a task."""
    modules = [f"{task}={path}" for task, path in adapters.items()]
    options = ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", "8", "--lora-modules", *modules]
    progress.print("vLLM starts with LoRA, which takes a minute")
    return served([*_vllm(python, base, port), *options], port, {}, ignore_eos=True)


def _vllm(python: str, base: Path, port: int) -> list[str]:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    return [*command, "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64"]

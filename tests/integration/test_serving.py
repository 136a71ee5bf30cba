"""A server under load, with OpenAI's own client: every answer is that of its row alone, and nothing is left over."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openai
import psutil
import pytest
import torch
from openai import AsyncOpenAI
from transformers import DynamicCache

from lightning_softprompt import SoftPrompts
from lightning_softprompt.serving.admission import Limits
from tests import tiny
from tests.inference.tasks import words
from tests.serving.helpers import RAGGED, Running, alone, save, serving, texts, wait

NEW = 12


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prompts")
    save(folder, RAGGED)
    return folder


def client_of(served: Running) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def expected(bare: Any, task: str | None, text: list[int], new: int = NEW) -> str:
    ids, _ = alone(bare, RAGGED[task] if task else [], text, new, never=2)
    return str(words().decode(ids, skip_special_tokens=True))


async def answer(client: AsyncOpenAI, task: str | None, text: list[int], stream: bool, new: int = NEW) -> str:
    asked: dict[str, Any] = {"model": task or "base", "prompt": text, "temperature": 0, "max_tokens": new}
    asked["extra_body"] = {"min_tokens": new}
    if not stream:
        return (await client.completions.create(**asked)).choices[0].text
    parts = await client.completions.create(**asked, stream=True)
    return "".join([part.choices[0].text async for part in parts])


@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_eight_ragged_tasks_and_the_base_at_once_are_what_they_are_alone(stream: bool, prompts: Path) -> None:
    asked = texts(32)

    async def all_at_once(served: Running) -> list[str]:
        async with client_of(served) as client:
            return await asyncio.gather(*(answer(client, task, text, stream) for task, text in asked))

    with serving(prompts) as served:
        found = asyncio.run(all_at_once(served))
        steps = served.engine.steps
    bare = tiny.tiny_model()
    assert found == [expected(bare, task, text) for task, text in asked]
    assert len({task for task, _ in asked}) == 9 and steps < 32 * NEW / 2  # they shared their passes


class Load:
    """Clients that ask, leave, err and draw, while the folder changes; what they should get is known before."""

    def __init__(self, count: int, seed: int = 0) -> None:
        bare = tiny.tiny_model()
        self._draw = random.Random(seed)
        self._known = [(task, text, expected(bare, task, text)) for task, text in texts(24, seed=1)]
        self._count = count
        self.answered = self.wrong = self.refused = self.left = 0

    async def run(self, served: Running, at_once: int = 40) -> None:
        gate = asyncio.Semaphore(at_once)

        async def one(client: AsyncOpenAI) -> None:
            async with gate:
                await self._one(client)
            if self.answered % 50 == 0:
                gc.collect()

        async with client_of(served) as client:
            await asyncio.gather(*(one(client) for _ in range(self._count)))

    async def _one(self, client: AsyncOpenAI) -> None:
        task, text, right = self._draw.choice(self._known)
        kind = self._draw.choices(["whole", "stream", "leaves", "leaves a stream", "bad"], [4, 3, 1, 1, 1])[0]
        if kind == "bad":
            await self._bad(client)
        elif kind == "leaves":
            work = asyncio.ensure_future(answer(client, task, text, stream=False, new=100))
            await asyncio.wait({work}, timeout=self._draw.random() * 0.05)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self.left += 1
        elif kind == "leaves a stream":
            more = {"max_tokens": 100, "stream": True, "extra_body": {"min_tokens": 100}}
            parts = await client.completions.create(model=task or "base", prompt=text, **more)
            async with contextlib.aclosing(aiter(parts)) as chunks:
                async for _ in chunks:
                    if self._draw.random() < 0.3:
                        break
            await parts.close()
            self.left += 1
        else:
            self.answered += 1
            self.wrong += await answer(client, task, text, stream=kind == "stream") != right

    async def _bad(self, client: AsyncOpenAI) -> None:
        wrong = [{"model": "nope"}, {"prompt": ""}, {"max_tokens": 10**6}, {"temperature": -1}, {"prompt": [10**6]}]
        wrong += [{"extra_body": {"echo": True}}, {"n": 1000}]
        try:
            await client.completions.create(**{"model": "task1", "prompt": "w6", **self._draw.choice(wrong)})
        except (openai.BadRequestError, openai.NotFoundError):
            self.refused += 1


def stress(folder: Path, count: int) -> tuple[Load, dict[str, float]]:
    """Put a server under load, and see what is left of it."""
    stopped = threading.Event()
    held_elsewhere = caches_alive()  # by what other tests left behind

    def write() -> None:
        prompts = SoftPrompts.from_pretrained(folder)
        while not stopped.wait(0.5):
            prompts.save_pretrained(folder)  # the same prompts, as new files and a new state

    with serving(folder, limits=Limits(max_rows=24, max_queue=64)) as served, collected_here():
        asyncio.run(Load(1000).run(served))  # what is made once, and what the C library keeps of what is freed
        load, first = Load(count), served.folder.current
        writer = threading.Thread(target=write)
        writer.start()
        before, began = resident(), time.perf_counter()
        asyncio.run(load.run(served))
        seconds = time.perf_counter() - began
        stopped.set()
        writer.join()
        wait(lambda: served.engine.running == 0 and served.engine.waiting == 0)
        assert served.folder.current is not first and served.folder.error is None
        left = {
            "running": served.engine.running,
            "waiting": served.engine.waiting,
            "columns": served.engine._batch.width,
        }
        left |= {"caches": caches_alive() - held_elsewhere, "seconds": seconds}
        return load, {**left, "grown": resident() - before}


@contextlib.contextmanager
def collected_here() -> Iterator[None]:
    """Let the collector run where it is called alone.

    Where it ends a generator of a client's in the server's thread, and that raises, pytest remembers the error, and
    the error the frames of that thread with the cache that they hold.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def caches_alive() -> int:
    gc.collect()
    return sum(type(each) is DynamicCache for each in gc.get_objects())


def resident() -> float:
    """The memory of this process, MiB."""
    return float(psutil.Process().memory_info().rss / 2**20)


# A call that is cancelled leaves its socket and its generators to the collector: a matter of the client's.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_thousand_requests_of_which_some_leave_and_some_are_bad(tmp_path: Path) -> None:
    save(tmp_path, RAGGED)
    load, left = stress(tmp_path, 2000)
    assert load.wrong == 0 and load.answered > 1200 and load.left > 250 and load.refused > 120
    assert load.answered + load.left + load.refused == 2000
    assert [left[name] for name in ("running", "waiting", "columns", "caches")] == [0, 0, 0, 0]
    assert left["grown"] < 40


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        save(Path(place), RAGGED)
        found, rest = stress(Path(place), parser.parse_args().requests)
        print({**vars(found), **rest, "_draw": None, "_known": None})

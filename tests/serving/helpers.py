"""Tasks, rows and a server to serve them, and what the bare model says of each row alone."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI

from lightning_softprompt import SoftPrompts, Tokens
from lightning_softprompt.inference.requests import RequestReader
from lightning_softprompt.serving.admission import Limits
from lightning_softprompt.serving.api import Settings, make_app
from lightning_softprompt.serving.engine import Engine
from lightning_softprompt.serving.growing_text import GrowingText
from lightning_softprompt.serving.rows import Part, TextRow
from lightning_softprompt.serving.sampling import Sampler
from lightning_softprompt.serving.server import Server, bind
from lightning_softprompt.serving.tasks import TaskFolder
from tests import tiny
from tests.inference.tasks import words

# Eight tasks of eight lengths, without templates.
RAGGED = {f"task{length}": [5 + length * 3 % 40 + place for place in range(length)] for length in range(1, 9)}


def prompts_of(hard: dict[str, list[int]], model: Any = None) -> SoftPrompts:
    return SoftPrompts.for_model(model or tiny.tiny_model(), {task: Tokens(ids) for task, ids in hard.items()})


@dataclass
class Asked:
    """A row, and the parts of its answer as they come."""

    row: TextRow
    parts: list[Part] = field(default_factory=list)

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for part in self.parts for token in part.tokens]


class RowMaking:
    """Makes rows of a tiny model's prompts."""

    def __init__(self, model: Any, prompts: SoftPrompts) -> None:
        self.prompts = prompts
        self._tokenizer = words()
        self._reader = RequestReader(model, self._tokenizer, prompts)

    def decoded(self, ids: list[int]) -> list[str]:
        return [self._tokenizer.decode([token]) for token in ids]

    def __call__(self, text: list[int], task: str | None, new: int, **options: Any) -> Asked:
        growing = GrowingText(self._tokenizer, options.pop("stop", ()))
        streams = options.pop("streams", False)
        request = self._reader.to_generate(0, text, task, new)
        asked: list[Asked] = []
        row = TextRow(
            request,
            self.prompts,
            lambda part: asked[0].parts.append(part),
            sampler=Sampler(**{"logprobs": 0, **options}),
            max_tokens=new,
            growing=growing,
            tokenizer=self._tokenizer,
            streams=streams,
        )
        asked.append(Asked(row))
        return asked[0]


def alone(
    bare: Any, prompt: list[int], text: list[int], new: int, never: int | None = None
) -> tuple[list[int], list[float]]:
    """The greedy tokens of the bare model behind hard tokens, and their log-probabilities, token by token."""
    ids, found = [*prompt, *text], []
    for _ in range(new):
        with torch.no_grad():
            logits = bare(torch.tensor([ids])).logits[0, -1].float()
        if never is not None:
            logits[never] = float("-inf")
        logprobs = logits.log_softmax(-1)
        ids.append(int(logprobs.argmax()))
        found.append(float(logprobs.max()))
    return ids[len(ids) - new :], found


def wait(until: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


@dataclass
class Running:
    """A server that runs in a thread of this process."""

    port: int
    engine: Engine
    folder: TaskFolder
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> OpenAI:
        """A client that is closed with the server: what is collected with an open connection warns."""
        asked = {"api_key": "none", "max_retries": 0, "timeout": 30.0, **options}
        return self.closing.enter_context(OpenAI(base_url=f"{self.url}/v1", **asked))


def call(
    served: Running, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, Any, Any]:
    """Status, body and headers, by hand."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(served.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def save(folder: Path, hard: dict[str, list[int]], templates: dict[str, Any] | None = None) -> None:
    prompts = prompts_of(hard)
    prompts.templates.update(templates or {})
    prompts.save_pretrained(folder)


@contextlib.contextmanager
def serving(
    folder: Path,
    raw: bool = False,
    limits: Limits | None = None,
    model: Any = None,
    on_engine: Callable[[Engine], object] = id,
    **settings: Any,
) -> Iterator[Running]:
    """Serve a folder of prompts of the tiny model on a free port."""
    model, tokenizer = tiny.tiny_model() if model is None else model, words()
    tasks = TaskFolder(model, tokenizer, folder, "base", raw)
    engine = Engine(model, tokenizer, limits)
    on_engine(engine)
    app = make_app(engine, tasks, tokenizer, Settings(**settings))
    socket, is_up = bind("127.0.0.1", 0), threading.Event()
    server = Server(app, engine, is_up.set)
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        assert is_up.wait(60)
        running = Running(socket.getsockname()[1], engine, tasks)
        with running.closing:
            yield running
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def texts(
    count: int, seed: int = 0, tasks: Sequence[str | None] = (*RAGGED, None)
) -> list[tuple[str | None, list[int]]]:
    """Texts of many lengths, tasks in turn."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (tasks[index % len(tasks)], torch.randint(5, tiny.VOCABULARY, (1 + index % 7,), generator=draw).tolist())
        for index in range(count)
    ]

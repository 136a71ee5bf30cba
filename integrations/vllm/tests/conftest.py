"""Servers, clients and what the bare model answers. `prepare.py` wrote the latter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from server import Server

PREPARED = Path(__file__).parents[3] / ".cache" / "vllm-run"


def client_of(server: Server) -> AsyncOpenAI:
    """A new client; one belongs to one event loop."""
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    return json.loads((PREPARED / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is served, which tests may change; at first the first prompts."""
    return Path(shutil.copytree(PREPARED / "first", tmp_path_factory.mktemp("served") / "prompts"))


@pytest.fixture(scope="session")
def server(expected, served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the folder `served`, by embeddings."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    made = Server(expected["base"], log, served, "--enable-prompt-embeds")
    yield made.wait()
    made.end()


def save(source: str, folder: Path) -> None:
    """Put the prompts of `source` in place of those in `folder`, in the order in which the library does."""
    earlier = set(folder.glob("*.safetensors"))
    for path in (PREPARED / source).glob("*.safetensors"):
        shutil.copy(path, folder)
        earlier.discard(folder / path.name)
    shutil.copy(PREPARED / source / "soft_prompts.json", folder / ".index")
    os.replace(folder / ".index", folder / "soft_prompts.json")
    for path in earlier:
        path.unlink()

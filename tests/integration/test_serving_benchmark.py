"""The peers of the serving benchmark answer what they are asked, all of them alike. Nothing here is timed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny
from tests.integration.scripts import benchmark
from tests.tokenizer import word_tokenizer

WORDS = ["good", "bad", "film", "news", "a", "the", "is", "so"]

# transformers 5.23 warns of a name that PEFT 0.21.2 reads.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def serving():
    with benchmark("serving") as module:
        yield module


@pytest.fixture
def paths(serving, tmp_path, monkeypatch) -> Any:
    monkeypatch.setattr(serving, "LENGTH", 3)
    stream = [4 + number * number % len(WORDS) for number in range(600)]
    tokenizer = word_tokenizer(WORDS)
    found = serving.folders(serving.peers.never_ending(tiny.tiny_model()), stream, tokenizer, tmp_path)
    return found, lambda: serving.Texts(tokenizer, stream)


def test_every_table_has_a_row_for_each_peer(serving, paths) -> None:
    folders, make = paths
    tables = asyncio.run(serving.measured(SimpleNamespace(quick=True, vllm=None), folders, make))
    peers = ["serve", "whole batches"]
    assert [row["what"] for row in tables["Rows that come at once"]] == peers
    assert [row["what"] for row in tables["Short beside long"]] == peers
    assert [row["what"] for row in tables["One request alone"]] == ["generate, no server", *peers]
    assert [(row["what"], row["clients"], row["tasks"]) for row in tables["Under load"]] == [
        (peer, *size) for peer in peers for size in ((1, 1), (4, 8))
    ]
    assert all(row["CPU seconds"] > 0 for row in tables["Rows that come at once"])
    assert {path.name for path in folders[2].values()} == {f"task{task}" for task in range(8)}


def test_peers_give_as_many_tokens_as_are_asked_for(serving, paths) -> None:
    folders, make = paths

    async def counts(name: str) -> list[int]:
        texts = make()
        async with serving.started(name, None, folders) as peer:
            return [await peer.ask(*texts.draw(8), count) for count in (1, 5, 3)]

    for name in ("serve", "whole batches"):
        assert asyncio.run(counts(name)) == [1, 5, 3]


def test_a_server_that_does_not_start_says_why(serving, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]

    async def start() -> None:
        async with sys.modules["served"].served(command, 1, {}):
            pass

    with pytest.raises(RuntimeError, match="does not serve: no such model"):
        asyncio.run(start())

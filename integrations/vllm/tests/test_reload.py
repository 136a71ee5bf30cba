"""A folder that is saved anew is served within seconds, and no answer mixes two saves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import client_of, save
from openai import NotFoundError
from server import Server
from test_answers import complete, equal


def wait_for(server: Server, tasks: list[str]) -> None:
    async def names() -> list[str]:
        async with client_of(server) as client:
            return [each.id for each in (await client.models.list()).data]

    deadline = time.monotonic() + 20
    while asyncio.run(names()) != ["base", *tasks]:
        assert time.monotonic() < deadline, f"the server does not list {tasks}"
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def first_again(server: Server, served: Path, expected: dict[str, Any]) -> Iterator[None]:
    yield
    save("first", served)
    wait_for(server, expected["tasks"]["first"])


def test_a_save_is_served_whole(server: Server, served: Path, expected: dict[str, Any]) -> None:
    save("second", served)
    wait_for(server, expected["tasks"]["second"])
    equal(asyncio.run(complete(server, expected["second"])), expected["second"])
    with pytest.raises(NotFoundError):
        asyncio.run(complete(server, [expected["first"][3]]))


def test_a_broken_save_leaves_what_was(server: Server, served: Path, expected: dict[str, Any]) -> None:
    (served / "soft_prompts.json").write_text("{")
    deadline = time.monotonic() + 20
    while "still serving the tasks of before" not in server.log.read_text(errors="replace"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    equal(asyncio.run(complete(server, expected["first"][:8])), expected["first"][:8])


def test_no_answer_is_of_two_saves(server: Server, served: Path, expected: dict[str, Any]) -> None:
    """Requests run on while the folder changes to and fro; each gets the answer of one of the two saves."""
    row, seen = expected["both"], set()

    async def ask(until: float) -> None:
        async with client_of(server) as client:
            while time.monotonic() < until:
                options = {"max_tokens": len(row["new"]), "temperature": 0, "prompt": row["text"]}
                body = {"ignore_eos": True, "return_token_ids": True}
                answer = await client.completions.create(model="soft-a", extra_body=body, **options)
                seen.add(tuple(answer.choices[0].token_ids))

    async def run() -> None:
        until = time.monotonic() + 15
        asking = [asyncio.create_task(ask(until)) for _ in range(4)]
        for turn in range(9):
            await asyncio.sleep(1.5)
            save(("second", "first")[turn % 2], served)
        await asyncio.gather(*asking)

    asyncio.run(run())
    assert row["new"] != row["other"] and seen == {tuple(row["new"]), tuple(row["other"])}

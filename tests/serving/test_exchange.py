"""An answer on its way: whoever leaves early frees the rows, streaming or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request as HTTPRequest

from lightning_softprompt.inference.requests import Request
from lightning_softprompt.serving.exchange import CLIENT_LEFT, Exchange, Inbox
from lightning_softprompt.serving.requests import CompletionRequest
from lightning_softprompt.serving.responses import Reply
from lightning_softprompt.serving.rows import Part, Row, TextRow
from tests.serving.helpers import prompts_of

SCOPE = {"type": "http", "method": "POST", "headers": [], "asgi": {"spec_version": "2.3"}}


class Client:
    """A client of one request, which can leave."""

    def __init__(self, count: int = 1) -> None:
        self.left = asyncio.Event()
        self.inbox = Inbox()
        self.statuses: list[int] = []
        self.sent: list[dict[str, Any]] = []
        self.rows: list[Row] = [
            TextRow(Request(0, [6], None, 9, ""), prompts_of({"a": [5]}), print) for _ in range(count)
        ]
        asked = CompletionRequest(model="base", prompt="x", n=count)
        request = HTTPRequest(SCOPE, self.receive)
        self.exchange = Exchange(request, Reply(asked, self.rows), self.rows, self.inbox, self.statuses.append)

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def are_free(self) -> bool:
        return all(row.is_cancelled for row in self.rows)

    @property
    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def run(work: Callable[[Client], Awaitable[None]], count: int = 1) -> Client:
    async def main() -> Client:
        client = Client(count)
        await work(client)
        return client

    return asyncio.run(main())


def test_a_whole_answer_has_its_rows_in_order() -> None:
    async def work(client: Client) -> None:
        client.inbox.deliver(1, Part("b", [], "length"))
        client.inbox.deliver(0, Part("a", [], "stop"))
        response = await client.exchange.whole()
        assert [choice["text"] for choice in json.loads(response.body)["choices"]] == ["a", "b"]

    assert run(work, count=2).statuses == [200]


def test_who_leaves_a_whole_answer_frees_its_rows() -> None:
    async def work(client: Client) -> None:
        waiting = asyncio.create_task(client.exchange.whole())
        client.inbox.deliver(0, Part("a", [], "stop"))
        await asyncio.sleep(0.01)
        assert not waiting.done() and not client.are_free
        client.left.set()
        response = await waiting
        assert response.status_code == CLIENT_LEFT and client.are_free

    run(work, count=2)


def test_a_server_that_cancels_an_answer_frees_its_rows() -> None:
    async def work(client: Client) -> None:
        waiting = asyncio.create_task(client.exchange.whole())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert client.are_free

    run(work)


@pytest.mark.parametrize("streams", [True, False])
def test_a_failure_before_the_first_part_has_its_status(streams: bool) -> None:
    async def work(client: Client) -> None:
        client.inbox.deliver(0, Part(failure="the device is on fire", status=503))
        response = await (client.exchange.stream(False) if streams else client.exchange.whole())
        assert response.status_code == 503 and json.loads(response.body)["error"]["message"] == "the device is on fire"
        assert client.are_free

    run(work, count=2)


async def streamed(client: Client, includes_usage: bool = False) -> None:
    response = await client.exchange.stream(includes_usage)
    await response(SCOPE, client.receive, client.send)


def test_a_stream_is_told_to_its_end() -> None:
    async def work(client: Client) -> None:
        for index, part in [(0, Part("a")), (1, Part("b", [], "stop")), (0, Part("", [], "length"))]:
            client.inbox.deliver(index, part)
        await streamed(client, includes_usage=True)

    client = run(work, count=2)
    lines = [line.removeprefix("data: ") for line in client.body.strip().split("\n\n")]
    assert lines[-1] == "[DONE]" and "usage" in json.loads(lines[-2]) and len(lines) == 5
    assert client.statuses == [200] and client.are_free


def test_a_failure_inside_a_stream_is_its_last_event() -> None:
    async def work(client: Client) -> None:
        client.inbox.deliver(0, Part("a"))
        client.inbox.deliver(0, Part(failure="the server is stopping", status=503))
        await streamed(client)

    client = run(work)
    assert json.loads(client.body.strip().split("data: ")[-1])["error"]["message"] == "the server is stopping"
    assert client.statuses == [503] and client.are_free and "[DONE]" not in client.body


@pytest.mark.parametrize("has_begun", [False, True])
def test_who_leaves_a_stream_frees_its_rows(has_begun: bool) -> None:
    async def work(client: Client) -> None:
        stream = asyncio.create_task(streamed(client))
        if has_begun:
            client.inbox.deliver(0, Part("a"))
            while not client.body:
                await asyncio.sleep(0.001)
        assert not client.are_free
        client.left.set()
        await asyncio.wait_for(stream, 5)
        assert client.are_free

    assert run(work).statuses == ([CLIENT_LEFT] if has_begun else [])


def test_a_stream_of_which_nothing_could_be_sent_frees_its_rows() -> None:
    async def work(client: Client) -> None:
        client.inbox.deliver(0, Part("a"))
        response = await client.exchange.stream(False)
        client.left.set()

        async def never(message: dict[str, Any]) -> None:
            await asyncio.Event().wait()

        await asyncio.wait_for(response(SCOPE, client.receive, never), 5)
        assert client.are_free

    assert run(work).statuses == [CLIENT_LEFT]


def test_parts_come_in_from_other_threads_and_after_the_end_of_the_loop() -> None:
    async def work(client: Client) -> None:
        await asyncio.to_thread(client.inbox.deliver, 0, Part("a"))
        assert await client.inbox.next() == (0, Part("a"))

    run(work).inbox.deliver(0, Part("b"))

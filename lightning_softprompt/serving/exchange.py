"""One request and its answer, whole or as a stream. Whoever leaves it early frees its rows."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi.responses import Response, StreamingResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from lightning_softprompt.serving.responses import DONE, Reply, error_body, event, refusal
from lightning_softprompt.serving.rows import Part, Row

CLIENT_LEFT = 499  # a status that nobody reads; in the metrics it says why there is no answer


class Inbox:
    """The parts of the answers to one request, as the model's thread delivers them to the loop of the server."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()

    def deliver(self, index: int, part: Part) -> None:
        """Put in a part of the answer to the row at an index. Any thread may call it."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._parts.put_nowait, (index, part))

    async def next(self) -> tuple[int, Part]:
        """The next part, and the index of its row."""
        return await self._parts.get()


class Exchange:
    """A request that is being answered.

    Args:
        request: as it came.
        reply: writes the answer.
        rows: those whose answers are awaited.
        inbox: where these come in.
        ended: told the HTTP status at the end of an answer, or of a stream that was broken off.
    """

    def __init__(
        self, request: Request, reply: Reply, rows: Sequence[Row], inbox: Inbox, ended: Callable[[int], None]
    ) -> None:
        self._request = request
        self._reply = reply
        self._rows = rows
        self._inbox = inbox
        self._ended = ended
        self._status = CLIENT_LEFT

    async def whole(self) -> Response:
        """The response with all answers."""
        answers: dict[int, Part] = {}
        try:
            while len(answers) < len(self._rows):
                found = await self._next_unless_gone()
                if found is None or found[1].failure is not None:
                    return self._without_answer(found)
                answers[found[0]] = found[1]
        finally:
            self._leave()
        self._ended(200)
        content = self._reply.whole([answers[index] for index in range(len(self._rows))])
        return Response(content, media_type="application/json")

    async def stream(self, includes_usage: bool) -> Response:
        """The response that is a stream. It begins with the first part, so that a failure before it has its status."""
        found = None
        try:
            found = await self._next_unless_gone()
        finally:
            if found is None or found[1].failure is not None:
                self._leave()
        if found is None or found[1].failure is not None:
            return self._without_answer(found)
        return _Stream(self._events(found, includes_usage), self._stream_ended)

    async def _events(self, found: tuple[int, Part], includes_usage: bool) -> AsyncIterator[str]:
        for chunk in self._reply.first_chunks():
            yield event(chunk)
        left = len(self._rows)
        while True:
            index, part = found
            if part.failure is not None:
                self._status = part.status
                yield event(json.dumps(error_body(part.status, part.failure)))
                return
            yield event(self._reply.chunk(index, part))
            left -= part.is_last
            if not left:
                break
            found = await self._inbox.next()
        if includes_usage:
            yield event(self._reply.usage_chunk())
        yield DONE
        self._status = 200

    def _stream_ended(self) -> None:
        self._leave()
        self._ended(self._status)

    def _leave(self) -> None:
        for row in self._rows:
            row.is_cancelled = True

    def _without_answer(self, found: tuple[int, Part] | None) -> Response:
        if found is None:
            return Response(status_code=CLIENT_LEFT)
        return refusal(found[1].status, found[1].failure or "")

    async def _next_unless_gone(self) -> tuple[int, Part] | None:
        """The next part; None if the client leaves before it has come."""
        part = asyncio.ensure_future(self._inbox.next())
        gone = asyncio.ensure_future(_until_gone(self._request))
        try:
            await asyncio.wait({part, gone}, return_when=asyncio.FIRST_COMPLETED)
            return part.result() if part.done() else None
        finally:
            part.cancel()
            gone.cancel()


class _Stream(StreamingResponse):
    """A stream of events that says when it has ended, also where not even its first event could be sent."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._has_ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._has_ended()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

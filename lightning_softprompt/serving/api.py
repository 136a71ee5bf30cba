"""The API of OpenAI over an engine: models, completions, chat completions, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Model
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.serving.bodies import parse_body, read_body
from lightning_softprompt.serving.engine import Engine
from lightning_softprompt.serving.metrics import Metrics
from lightning_softprompt.serving.requests import AnswerRequest, ChatRequest, CompletionRequest
from lightning_softprompt.serving.responses import DONE, Reply, error_body, event, refusal
from lightning_softprompt.serving.rows import Part, Row
from lightning_softprompt.serving.tasks import TaskFolder

Result = TypeVar("Result")

_CLIENT_LEFT = 499  # nobody reads it; in the metrics it says why there is no answer
_LOOK_EVERY = 1.0  # seconds between two looks at the folder


@dataclass(frozen=True)
class Settings:
    """What an API allows.

    Attributes:
        api_key: what clients have to send as their bearer token; None lets everybody in.
        max_body_bytes: the most bytes of a request's body.
        max_new_tokens: the most tokens of an answer where the client leaves that open.
    """

    api_key: str | None = None
    max_body_bytes: int = 4 * 2**20
    max_new_tokens: int = 256


def make_app(engine: Engine, folder: TaskFolder, tokenizer: Any, settings: Settings = Settings()) -> FastAPI:  # noqa: B008
    """The web application. It starts the engine with itself, and stops it.

    Args:
        engine: one that was not started.
        folder: the tasks.
        tokenizer: the model's tokenizer.
        settings: what it allows.
    """
    api = _Api(engine, folder, tokenizer, settings)
    app = FastAPI(title="lightning-softprompt", lifespan=api.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/completions", api.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", api.chat_completions, methods=["POST"])
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name:path}", api.model)
    app.add_api_route("/health", api.health)
    app.add_api_route("/metrics", api.metrics_text)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(Exception, _failed)
    return app


class _Api:
    def __init__(self, engine: Engine, folder: TaskFolder, tokenizer: Any, settings: Settings) -> None:
        self._engine = engine
        self._folder = folder
        self._tokenizer = tokenizer
        self._settings = settings
        self._metrics = Metrics(engine)
        # Texts become tokens one request at a time, beside the loop: a long one holds up no stream.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="soft-prompt-reader")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._engine.start()
        watch = asyncio.create_task(self._watch())
        yield
        watch.cancel()
        self._engine.stop()
        await asyncio.to_thread(self._engine.join, 1.0)
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await asyncio.to_thread(self._folder.refresh)

    async def completions(self, request: Request) -> Response:
        return await self._counted(request, CompletionRequest)

    async def chat_completions(self, request: Request) -> Response:
        return await self._counted(request, ChatRequest)

    async def models(self, request: Request) -> Response:
        if not self._may_ask(request):
            return _wrong_key()
        data = [self._described(name) for name in self._folder.current.names]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request, name: str) -> Response:
        if not self._may_ask(request):
            return _wrong_key()
        known = name in self._folder.current.names
        return JSONResponse(self._described(name)) if known else self._no_such_model(name)

    async def health(self) -> Response:
        tasks, engine = self._folder.current, self._engine
        found = {
            "status": "ok" if engine.is_alive else "stopping",
            "running": engine.running,
            "waiting": engine.waiting,
            "base": tasks.base,
            "tasks": list(tasks.prompts.tasks),
            "whole_batches": engine.obstacle,
            "prompts_error": self._folder.error,
        }
        return JSONResponse(found, 200 if engine.is_alive else 503)

    async def metrics_text(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _counted(self, request: Request, kind: type[AnswerRequest]) -> Response:
        try:
            response, model = await self._answer(request, kind)
        except ClientDisconnect:
            response, model = Response(status_code=_CLIENT_LEFT), ""
        if response.status_code != 200:
            self._metrics.count(model, response.status_code)
        return response

    async def _answer(self, request: Request, kind: type[AnswerRequest]) -> tuple[Response, str]:
        began = time.perf_counter()
        if not self._may_ask(request):
            return _wrong_key(), ""
        body = await read_body(request, self._settings.max_body_bytes)
        if body is None:
            most = self._settings.max_body_bytes
            return refusal(413, f"the body is larger than {most} bytes; send less, or start with --max_body_bytes"), ""
        asked = await self._read(lambda: parse_body(body, kind))
        if isinstance(asked, tuple):
            return refusal(400, *asked), ""
        tasks = self._folder.current
        if asked.model not in tasks.names:
            return self._no_such_model(asked.model), ""
        inbox: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index: int, part: Part) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(inbox.put_nowait, (index, part))

        limits = self._engine.longest, self._settings.max_new_tokens
        try:
            rows = await self._read(
                lambda: asked.rows(tasks, self._tokenizer, self._engine.end_tokens, limits, deliver)
            )
        except SoftPromptError as error:
            return refusal(400, str(error)), asked.model
        if not self._engine.submit(rows):
            why = f"{self._engine.waiting} rows wait already, and there is no room for {len(rows)} more; try again later"
            return refusal(429, why, headers={"retry-after": "1"}), asked.model
        exchange = _Exchange(request, Reply(asked, rows), rows, inbox)

        def ended(status: int) -> None:
            self._metrics.count(asked.model, status, rows, began)

        if asked.stream:
            return await exchange.stream(asked.includes_usage, ended), asked.model
        return await exchange.whole(ended), asked.model

    async def _read(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def _may_ask(self, request: Request) -> bool:
        key = self._settings.api_key
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return key is None or (scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), key.encode()))

    def _described(self, name: str) -> dict[str, Any]:
        tasks = self._folder.current
        found = Model(id=name, object="model", created=tasks.created, owned_by="lightning-softprompt")
        return {**found.model_dump(), "parent": None if name == tasks.base else tasks.base}

    def _no_such_model(self, name: str) -> Response:
        known = ", ".join(map(repr, self._folder.current.names))
        return refusal(404, f"there is no model {name!r:.200}; models: {known}", "model")


class _Exchange:
    """One request and its answer, under way: whoever leaves it early frees its rows."""

    def __init__(
        self, request: Request, reply: Reply, rows: Sequence[Row], inbox: asyncio.Queue[tuple[int, Part]]
    ) -> None:
        self._request = request
        self._reply = reply
        self._rows = rows
        self._inbox = inbox

    async def whole(self, ended: Callable[[int], None]) -> Response:
        """The response with all answers."""
        answers: dict[int, Part] = {}
        status = _CLIENT_LEFT
        try:
            while len(answers) < len(self._rows):
                found = await self._unless_gone(self._inbox.get())
                if found is None:
                    return Response(status_code=status)
                index, part = found
                if part.failure is not None:
                    status = part.status
                    return refusal(status, part.failure)
                answers[index] = part
            status = 200
            content = self._reply.whole([answers[index] for index in range(len(self._rows))])
            return Response(content, media_type="application/json")
        finally:
            self._leave()
            if status == 200:
                ended(status)

    async def stream(self, includes_usage: bool, ended: Callable[[int], None]) -> Response:
        """The response that is a stream. It begins with the first part, so that a failure before it has its status."""
        try:
            first = await self._unless_gone(self._inbox.get())
        except BaseException:
            self._leave()
            raise
        if first is None or first[1].failure is not None:
            self._leave()
            part = Part(failure="", status=_CLIENT_LEFT) if first is None else first[1]
            return refusal(part.status, part.failure or "")
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        events = self._events(first, includes_usage, ended)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(
        self, found: tuple[int, Part], includes_usage: bool, ended: Callable[[int], None]
    ) -> AsyncIterator[str]:
        status, left = _CLIENT_LEFT, len(self._rows)
        try:
            for chunk in self._reply.first_chunks():
                yield event(chunk)
            while True:
                index, part = found
                if part.failure is not None:
                    status = part.status
                    yield event(json.dumps(error_body(status, part.failure)))
                    return
                yield event(self._reply.chunk(index, part))
                left -= part.is_last
                if not left:
                    break
                found = await self._inbox.get()
            if includes_usage:
                yield event(self._reply.usage_chunk())
            yield DONE
            status = 200
        finally:
            self._leave()
            ended(status)

    def _leave(self) -> None:
        for row in self._rows:
            row.is_cancelled = True

    async def _unless_gone(self, result: Awaitable[Result]) -> Result | None:
        """A result; None if the client leaves before it has come."""
        work, gone = asyncio.ensure_future(result), asyncio.ensure_future(_until_gone(self._request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            work.cancel()
            gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _wrong_key() -> Response:
    return refusal(401, "the API key is missing or wrong; send it as a bearer token", headers={"www-authenticate": "Bearer"})


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = "POST /v1/completions, POST /v1/chat/completions, GET /v1/models, /health and /metrics"
    message = f"{request.method} {request.url.path:.200}: {error.detail}; there is {routes}"
    return refusal(error.status_code, message, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(500, "the server failed at this request; its log says why")

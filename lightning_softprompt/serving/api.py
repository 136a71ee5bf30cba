"""The API of OpenAI over an engine: models, completions, chat completions, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from openai.types import Model
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.serving import bodies
from lightning_softprompt.serving.bodies import parse_body, read_body
from lightning_softprompt.serving.engine import STOPPED, Engine
from lightning_softprompt.serving.exchange import CLIENT_LEFT, Exchange, Inbox
from lightning_softprompt.serving.metrics import Metrics
from lightning_softprompt.serving.requests import AnswerRequest, ChatRequest, CompletionRequest
from lightning_softprompt.serving.responses import Reply, refusal
from lightning_softprompt.serving.row_making import RowMaker
from lightning_softprompt.serving.rows import Row
from lightning_softprompt.serving.tasks import ServedTasks, TaskFolder

Result = TypeVar("Result")

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


def make_app(engine: Engine, folder: TaskFolder, tokenizer: Any, settings: Settings | None = None) -> FastAPI:
    """The web application. It starts the engine with itself, and stops it.

    Args:
        engine: one that was not started.
        folder: the tasks.
        tokenizer: the model's tokenizer.
        settings: what it allows; None stands for the defaults.
    """
    api = _Api(engine, folder, tokenizer, settings or Settings())
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
        self._settings = settings
        self._metrics = Metrics(engine)
        self._maker = RowMaker(
            tokenizer, engine.end_tokens, engine.longest, engine.limits.max_queue, settings.max_new_tokens
        )
        self._being_read = 0
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
        def look() -> None:
            with self._engine.attaching:
                self._folder.refresh()

        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await asyncio.to_thread(look)

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
            response, model = Response(status_code=CLIENT_LEFT), ""
        except asyncio.CancelledError:
            if self._engine.is_alive:
                raise
            response, model = refusal(503, STOPPED), ""  # the server ends, and has waited for what was still to come
        if response.status_code != 200:
            self._metrics.count(model, response.status_code)
        return response

    async def _answer(self, request: Request, kind: type[AnswerRequest]) -> tuple[Response, str]:
        """The response, and the name of the model if it is one that is served."""
        began = time.perf_counter()
        if not self._may_ask(request):
            return _wrong_key(), ""
        if self._being_read >= self._maker.most_rows:
            return self._no_room(1), ""
        self._being_read += 1
        try:
            read = await self._asked(request, kind)
            if isinstance(read, Response):
                return read, ""
            inbox = Inbox()
            try:
                # A request belongs to one state of the prompts, whatever becomes of the folder.
                rows = await self._in_reader(lambda: self._maker.rows(*read, inbox.deliver))
            except SoftPromptError as error:
                return refusal(400, str(error)), read[0].model
        finally:
            self._being_read -= 1
        return await self._answered(request, read[0], rows, inbox, began), read[0].model

    async def _asked(self, request: Request, kind: type[AnswerRequest]) -> tuple[AnswerRequest, ServedTasks] | Response:
        """What is asked and the tasks as they are now; the refusal of what cannot be read."""
        try:
            reading = read_body(request, self._settings.max_body_bytes)
            body = await asyncio.wait_for(reading, bodies.SLOWEST)
        except asyncio.TimeoutError:
            return refusal(408, f"the body has not come in within {bodies.SLOWEST:.0f} seconds; send it at once")
        if body is None:
            most = self._settings.max_body_bytes
            return refusal(413, f"the body is larger than {most} bytes; send less, or serve with --max_body_bytes")
        asked = await self._in_reader(lambda: parse_body(body, kind))
        if isinstance(asked, tuple):
            return refusal(400, *asked)
        tasks = self._folder.current
        return (asked, tasks) if asked.model in tasks.names else self._no_such_model(asked.model)

    async def _answered(
        self, request: Request, asked: AnswerRequest, rows: Sequence[Row], inbox: Inbox, began: float
    ) -> Response:
        if not self._engine.submit(rows):
            return self._no_room(len(rows))

        def ended(status: int) -> None:
            self._metrics.count(asked.model, status, rows, began)

        exchange = Exchange(request, Reply(asked, rows), rows, inbox, ended)
        return await (exchange.stream(asked.includes_usage) if asked.stream else exchange.whole())

    def _no_room(self, rows: int) -> Response:
        why = f"{self._engine.waiting} rows wait already, and there is no room for {rows} more; ask again later"
        return refusal(429, why, headers={"retry-after": "1"})

    async def _in_reader(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def _may_ask(self, request: Request) -> bool:
        key = self._settings.api_key
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are bytes, which the framework reads as Latin-1, and clients write in UTF-8.
        sent = given.encode("latin-1")
        return key is None or (scheme.lower() == "bearer" and hmac.compare_digest(sent, key.encode()))

    def _described(self, name: str) -> dict[str, Any]:
        tasks = self._folder.current
        found = Model(id=name, object="model", created=tasks.created, owned_by="lightning-softprompt")
        return {**found.model_dump(), "parent": None if name == tasks.base else tasks.base}

    def _no_such_model(self, name: str) -> Response:
        known = ", ".join(map(repr, self._folder.current.names))
        return refusal(404, f"there is no model {name!r:.200}; models: {known}", "model")


def _wrong_key() -> Response:
    return refusal(
        401, "the API key is missing or wrong; send it as a bearer token", headers={"www-authenticate": "Bearer"}
    )


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = "POST /v1/completions, POST /v1/chat/completions, GET /v1/models, /health and /metrics"
    message = f"{request.method} {request.url.path:.200}: {error.detail}; there is {routes}"
    return refusal(error.status_code, message, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(500, "the server failed at this request; its log says why")

"""What the API refuses, who may ask it, how much at once, and what becomes of clients that leave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lightning_softprompt.serving import bodies
from lightning_softprompt.serving.admission import Limits
from tests.inference.tasks import HARD, TEMPLATES
from tests.serving.helpers import Running, call, save, serving, wait


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prompts")
    save(folder, HARD, TEMPLATES)
    return folder


@pytest.fixture(scope="module")
def served(prompts: Path) -> Iterator[Running]:
    with serving(prompts, max_body_bytes=2**20, limits=Limits(max_queue=40)) as running:
        yield running


@pytest.mark.parametrize(
    "asked, status, said",
    [
        ({"model": "nope"}, 404, "there is no model 'nope'"),
        ({"temperature": 3}, 400, "'temperature': Input should be less than or equal to 2"),
        ({"prompt": ""}, 400, "the text has no tokens"),
        ({"max_tokens": 500}, 400, "more than the model's 128 positions"),
        ({"n": 41}, 400, "asks for 41 answers at once, and the server takes 40"),
        ({"logit_bias": {"1": 1}}, 400, "'logit_bias' is not served here"),
        ({"model": "short"}, 400, "a text alone fills a template of one column"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_told_in_openai_s_shape(
    asked: dict[str, Any], status: int, said: str, stream: bool, served: Running
) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        served.client().completions.create(**{"model": "raw", "prompt": "w30", "stream": stream, **asked})
    assert error.value.status_code == status and said in error.value.message
    assert set(error.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "path, body, method, status",
    [
        ("/v1/completions", b"{", None, 400),
        ("/v1/completions", b"[" * 10**5, None, 400),
        ("/v1/completions", b"\x00\xff", None, 400),
        ("/v1/completions", [1], None, 400),
        ("/v1/completions", {"model": "\ud800", "prompt": "w30"}, None, 404),
        ("/v1/completions", {"model": "raw", "prompt": "\ud800", "\ud800": 1}, None, 400),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "\ud800", "content": ""}]}, None, 400),
        ("/v1/chat/completions", {"model": "base"}, None, 400),
        ("/v1/completions", b" " * (2**20 + 1), None, 413),
        ("/v1/completions", b" " * 2**26, None, 413),
        ("/v1/embeddings", {}, None, 404),
        ("/v1/models", None, "DELETE", 405),
        ("/v1/completions", None, "GET", 405),
    ],
)
def test_whatever_comes_is_refused_in_openai_s_shape(
    path: str, body: Any, method: str | None, status: int, served: Running
) -> None:
    found, content, _ = call(served, path, body, method)
    assert found == status and set(content["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_does_not_come_in_is_not_waited_for(served: Running, monkeypatch) -> None:
    monkeypatch.setattr(bodies, "SLOWEST", 0.05)
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 408")


def test_a_key(prompts: Path) -> None:
    with serving(prompts, api_key="of gold") as served:
        assert next(model.id for model in served.client(api_key="of gold").models.list()) == "base"
        served.client(api_key="of gold").completions.create(model="long", prompt="w30")
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            served.client(api_key="of silver").completions.create(model="long", prompt="w30")
        for path, body in (("/v1/models", None), ("/v1/models/long", None), ("/v1/completions", {"model": "long"})):
            for headers in ({}, {"authorization": "of gold"}, {"authorization": "Basic of gold"}):
                status, content, sent = call(served, path, body, **headers)
                assert (status, content["error"]["code"]) == (401, "invalid_api_key")
                assert sent["www-authenticate"] == "Bearer"
        assert call(served, "/health")[0] == call(served, "/metrics")[0] == 200


def test_a_key_of_any_characters(prompts: Path) -> None:
    with serving(prompts, api_key="schlüssel") as served:
        for sent, status in (("schlüssel", 200), ("schlussel", 401), ("schl\xc3ssel", 401)):
            with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
                head = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {sent}\r\n\r\n"
                sock.sendall(head.encode())
                assert sock.recv(100).startswith(b"HTTP/1.1 %d" % status)


def test_a_full_queue_says_when_to_come_again(prompts: Path) -> None:
    with serving(prompts, limits=Limits(max_queue=2, max_rows=1)) as served:
        step, until = served.engine._batch.step, time.monotonic() + 20
        client, held = served.client(), [True]

        def slow() -> None:
            while held[0] and time.monotonic() < until:
                time.sleep(0.002)
            step()

        served.engine._batch.step = slow  # type: ignore[method-assign]
        # Greedily: a first token that ends the text, or is none of it, would leave nothing to wait for.
        streams = [client.completions.create(model="raw", prompt="w30", max_tokens=5, temperature=0, stream=True)]
        wait(lambda: served.engine.running == 1)
        body = {"model": "raw", "prompt": ["w30", "w31"], "max_tokens": 5}
        sock = socket.create_connection(("127.0.0.1", served.port))
        raw = json.dumps(body).encode()
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
        wait(lambda: served.engine.waiting == 2)
        status, content, headers = call(served, "/v1/completions", {"model": "raw", "prompt": "w30"})
        assert (status, content["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
        sock.close()  # who waits for a whole answer, and leaves
        wait(lambda: served.engine.waiting == 0)
        held[0] = False
        assert len([*streams[0]]) >= 1
        retrying = served.client(max_retries=2)
        assert retrying.completions.create(model="raw", prompt="w30", max_tokens=5).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(stream: bool, served: Running) -> None:
    body = {"model": "raw", "prompt": "w30", "max_tokens": 110, "min_tokens": 110, "stream": stream}
    step = served.engine._batch.step

    def slow() -> None:
        time.sleep(0.02)
        step()

    served.engine._batch.step = slow  # type: ignore[method-assign]
    try:
        raw = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
            wait(lambda: served.engine.running == 1)
            assert not stream or sock.recv(10)
        began = time.monotonic()
        wait(lambda: served.engine.running == 0)
        assert time.monotonic() - began < 1.5  # the whole answer takes more than two seconds
    finally:
        served.engine._batch.step = step  # type: ignore[method-assign]

"""The process of a server: its address, and its end while streams are open."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import openai
import pytest

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.serving.api import make_app
from lightning_softprompt.serving.engine import Engine
from lightning_softprompt.serving.server import Server, bind
from lightning_softprompt.serving.tasks import TaskFolder
from tests import tiny
from tests.cli.command_line import ROOT
from tests.inference.tasks import words
from tests.serving.helpers import save


def test_an_address_that_cannot_be_had_is_said() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        first.listen()
        with pytest.raises(SoftPromptError, match=f"port {port} of 127.0.0.1 is in use; give another --port"):
            bind("127.0.0.1", port)
    with pytest.raises(SoftPromptError, match=r"'256.0.0.1' is no address of this machine .*; give another host"):
        bind("256.0.0.1", 0)
    for port in (-1, 10**6):
        with pytest.raises(SoftPromptError, match="give another"):
            bind("127.0.0.1", port)


def test_two_servers_that_begin_at_once_do_not_share_a_port(tmp_path: Path, caplog) -> None:
    save(tmp_path, {"tone": [5, 6]})
    model, tokenizer = tiny.tiny_model(), words()
    engine = Engine(model, tokenizer)
    app = make_app(engine, TaskFolder(model, tokenizer, tmp_path, "base"), tokenizer)
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:  # while the first one loads its model
            first.listen()
            with pytest.raises(SoftPromptError, match=f"port {port} is in use; give another --port"):
                Server(app, engine, pytest.fail).run(sockets=[second])
    assert not engine.is_alive and "Traceback" not in caplog.text


@contextmanager
def process(base: Path, prompts: Path) -> Iterator[tuple[subprocess.Popen, openai.OpenAI]]:
    command = [sys.executable, "-m", "lightning_softprompt.cli", "serve", "--base", base, "--prompts", prompts]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [*map(str, command), "--port=0", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
                yield server, client
        finally:
            server.kill()


def test_a_connection_is_kept_between_requests(tiny_base: Path, tmp_path: Path) -> None:
    """A balancer sends its next request on a connection that it holds open, for a minute as a rule."""
    save(tmp_path / "prompts", {"tone": [5, 6]})
    with process(tiny_base, tmp_path / "prompts") as (_, client):
        address = client.base_url
        with closing(HTTPConnection(address.host, address.port, timeout=12)) as held:
            for wait in (6, 0):
                held.request("GET", "/health")
                assert held.getresponse().read()
                time.sleep(wait)


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_ends_it_within_ten_seconds_though_a_stream_is_open(
    sent: signal.Signals, status: int, tiny_base: Path, tmp_path: Path
) -> None:
    save(tmp_path / "prompts", {"tone": [5, 6]})
    with process(tiny_base, tmp_path / "prompts") as (server, client):
        # 50 texts of 120 tokens, of which one is read at a time: more than the patience of a server.
        body = {"min_tokens": 120}
        streams = [
            client.completions.create(
                model="tone", prompt=["good"] * 50, n=5, max_tokens=120, stream=True, extra_body=body
            )
            for _ in range(1)
        ]
        next(iter(streams[0]))
        address = client.base_url
        coming = socket.create_connection((address.host, address.port), timeout=12)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n"
        coming.sendall(head)
        assert coming.recv(100).startswith(b"HTTP/1.1 100")  # it waits for the body, which never comes
        began = time.monotonic()
        server.send_signal(sent)
        try:
            count = sum(1 for _ in streams[0])
            assert count > 0  # it came to its end before the patience did
        except openai.APIError as error:
            assert "the server is stopping" in error.message
        with coming:
            answer = b"".join(iter(lambda: coming.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"the server is stopping" in answer
        assert server.wait(12) == status and time.monotonic() - began < 10
        assert server.stderr is not None
        assert b"Traceback" not in server.stderr.read()

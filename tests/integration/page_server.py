"""The server that a page starts, and what the page asks it, each at a port that is free."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ADDRESS = "http://127.0.0.1:8000/v1"  # as the pages have it


class PageServer:
    """Runs `lightning-softprompt serve` as a page gives it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._url = ""

    def start(self, arguments: Sequence[str]) -> None:
        self.stop()
        command = [sys.executable, "-m", "lightning_softprompt.cli", "serve", *arguments, "--port=0"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stdout is not None
        self._process = process
        said = re.fullmatch(r"serving (.+) at (http://127\.0\.0\.1:\d+/v1)\n", process.stdout.readline())
        assert said is not None
        self._url = said[2]

    def asked(self, curl: Sequence[str]) -> dict[str, object]:
        """What a line of `curl` gets."""
        _, url, flag, data = curl
        assert flag == "-d" and url.startswith(ADDRESS + "/")
        with urllib.request.urlopen(self.here(url), data.encode(), timeout=20) as response:
            found: dict[str, object] = json.loads(response.read())
        return found

    def here(self, text: str) -> str:
        """A text of a page, with the address that is served."""
        assert ADDRESS in text
        return text.replace(ADDRESS, self._url)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(15) == -signal.SIGTERM
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@contextmanager
def page_server() -> Iterator[PageServer]:
    server = PageServer()
    try:
        yield server
    finally:
        server.stop()

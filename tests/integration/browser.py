"""Headless Chromium, told what to do over its DevTools protocol through two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
EXECUTABLE = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a running Chromium.

    Attributes:
        requested: the addresses that the page has asked for since it was opened.
    """

    def __init__(self, to: BinaryIO, come: BufferedReader) -> None:
        self.requested: list[str] = []
        self._to, self._come = to, come
        self._number, self._session, self._read = 0, "", b""
        self._events: set[str] = set()
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self._ask(f"{domain}.enable")

    def show(self, address: str, width: int) -> None:
        """Open a page in a window of that width, and wait until it stands."""
        self.resize(width)
        self._events.clear()
        self._ask("Page.navigate", url=address)
        while "Page.loadEventFired" not in self._events:
            self._take(self._message())

    def resize(self, width: int) -> None:
        """Give the window another width."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **screen)

    def value(self, script: str) -> Any:
        """What a JavaScript expression, or the promise that it gives, comes to."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path, most: int = 3000) -> None:
        """Save the page as a PNG, behind the end of the window, too, but `most` pixels of it."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1, "width": size["width"], "height": min(size["height"], most)}
        taken = self._ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            came = self._message()
            if came.get("id") == self._number:
                assert "error" not in came, came
                return came["result"]
            self._take(came)

    def _take(self, event: dict[str, Any]) -> None:
        self._events.add(event.get("method", ""))
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(event["params"]["request"]["url"])

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            came = self._come.read1(65536)
            assert came, "Chromium has ended"
            self._read += came
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a profile of its own, and end it afterwards."""
    assert EXECUTABLE is not None
    its_input, to = os.pipe()
    come, its_output = os.pipe()
    # The protocol has fixed numbers for the two: 3 and 4.
    command = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    flags += ["--allow-file-access-from-files", "--hide-scrollbars"]
    process = subprocess.Popen(
        ["bash", "-c", command, EXECUTABLE, *flags], pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL
    )
    os.close(its_input)
    os.close(its_output)
    try:
        with os.fdopen(to, "wb") as sent, os.fdopen(come, "rb") as received:
            yield Browser(sent, received)
    finally:
        process.kill()
        process.wait()

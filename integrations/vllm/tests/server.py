"""vLLM's own server with the plugin, as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

# Seconds until a server answers; half a minute where nothing else runs.
PATIENCE = 300


class Server:
    """A server on this machine.

    Args:
        model: the folder of the model, whose name is `base`.
        log: the file that gets what the server prints.
        prompts: the value of `SOFTPROMPT_FOLDER`; None leaves it out.
        options: more of its options.
    """

    def __init__(self, model: str | Path, log: Path, prompts: Path | None, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        settings = {"VLLM_PLUGINS": "softprompt", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        settings |= {"HF_HUB_OFFLINE": "1"} | ({} if prompts is None else {"SOFTPROMPT_FOLDER": str(prompts)})
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(self.port)]
        # Blocks of 32: prompts of 32, 64 and 100 tokens are shared by 32, 64 and 96. Eager: compiling takes a minute.
        command += ["--dtype", "float32", "--max-model-len", "512", "--block-size", "32", "--enforce-eager"]
        command += ["--max-num-seqs", "32", "--enable-prompt-tokens-details", *options]
        with log.open("wb") as file:
            # A session of its own, so that what the server starts ends with it.
            self._process = subprocess.Popen(
                command, env=os.environ | settings, stdout=file, stderr=file, cwd=log.parent, start_new_session=True
            )

    @property
    def url(self) -> str:
        """Where its routes are."""
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> Server:
        """Wait until it answers."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AssertionError(f"the server ended: {self.last_line()}")
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.end()
        raise AssertionError(f"the server did not start in {PATIENCE} seconds: {self.last_line()}")

    def status(self) -> int:
        """Wait until it has ended by itself, and return its exit status."""
        try:
            return self._process.wait(PATIENCE)
        finally:
            self.end()

    def last_line(self) -> str:
        """The last line that it printed."""
        return (self.log.read_text(errors="replace").splitlines() or [""])[-1]

    def end(self) -> None:
        """End it, with what it started."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

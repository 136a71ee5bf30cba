"""The process of a server: its socket, and an end within seconds."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.serving.engine import Engine

# Seconds that rows under way have to come to their end, and in which connections have to close, once a signal came.
_PATIENCE = 4.0
_CLOSING = 5
_KEEPING = 75  # of a connection without a request: longer than balancers, which reuse those that they hold open


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address. Nobody can connect before a server listens on it.

    Args:
        host: a name or an address.
        port: 0 takes any that is free.

    Raises:
        SoftPromptError: an address that cannot be had.

    Example:
        >>> with bind("127.0.0.1", 0) as found:
        ...     found.getsockname()[1] > 0
        True
    """
    if not 0 <= port < 2**16:
        raise SoftPromptError(f"port {port} cannot be had, as ports are 0 to {2**16 - 1}; give another port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SoftPromptError(f"{host!r} is no address of this machine ({error}); give another host") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise SoftPromptError(f"port {port} of {host} {_why(error)}; give another --port") from error
    return found


def _why(error: OSError) -> str:
    return "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error})"


class Server(uvicorn.Server):
    """Serves an application until SIGTERM or Ctrl-C. Rows under way may end then, for some seconds.

    Args:
        app: the application.
        engine: its engine.
        listens: called when clients can connect.
    """

    def __init__(self, app: Any, engine: Engine, listens: Callable[[], object]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                timeout_keep_alive=_KEEPING,
                timeout_graceful_shutdown=_CLOSING,
            )
        )
        self._engine = engine
        self._listens = listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell so.

        Raises:
            SoftPromptError: another process listens on the address, which it bound at the same time.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            places = ", ".join(f"port {each.getsockname()[1]}" for each in sockets or ())
            raise SoftPromptError(f"{places} {_why(error)}; give another --port") from error
        if self.started:
            self._listens()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more rows, and end."""
        self._engine.stop(0.0 if self.should_exit else _PATIENCE)
        super().handle_exit(sig, frame)

"""How the servers of this package listen: what a connection may cost, and for how long.

Decides the limits of connections and of silence, and what is logged about them. Knows nothing of
what is served. The protocol is uvicorn's; it bounds answers and keep-alive, and leaves the rest to
a proxy in front, which a server on a laptop does not have.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import InputError

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_MOST_CONNECTIONS = 1024
_MOST_BACKLOG = 2048
_TICK_S = 1.0
# Seconds a client may keep the server waiting. Bodies have 30 s with an answer to those who are
# slower; this ends those that even then hold their connection.
_PATIENCE_S = {"headers": 10.0, "body": 40.0, "reader": 60.0}
_REPEAT_S = 60.0


def server_config(app: Any, *, host: str, port: int, shutdown_s: int) -> uvicorn.Config:
    """Return how uvicorn serves an application, each connection within its bounds.

    Args:
        app: The ASGI application.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one, which the log names.
        shutdown_s: Seconds that requests begun have to end after a signal.
    """
    for name in ("asyncio", "uvicorn.error", __name__):
        log = logging.getLogger(name)
        if not any(isinstance(known, _NoRepeats) for known in log.filters):
            log.addFilter(_NoRepeats())
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedProtocol,
        ws="none",
        loop="asyncio",
        # Also how many connections are accepted at once, before one that is too many is closed.
        backlog=min(_MOST_BACKLOG, max(4, _descriptors() // 16)),
        log_config=None,
        access_log=False,  # it would write down any path, and so any text in one
        server_header=False,
        timeout_graceful_shutdown=shutdown_s,
    )


def check_address(host: str, port: int) -> None:
    """Look whether a server could listen there, which libraries tell late and by a traceback.

    Raises:
        InputError: If not.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port must be between 0 and 65535, got {port}. 0 takes any that is free.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        number = error.errno or 0  # negative where a name is unknown
        reason = os.strerror(number) if number > 0 else error.strerror or error
        raise InputError(
            f"nothing can be served at {host}, port {port} ({reason}). Pass another --port, or 0 "
            "for any that is free."
        ) from error


def most_connections() -> int:
    """Return how many connections are held: half of the descriptors that the process may have.

    The other half is for the model's files and for connections that are being closed.
    """
    return min(_MOST_CONNECTIONS, _descriptors() // 2)


def _descriptors() -> int:
    if resource is None:
        return 2 * _MOST_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft


class BoundedProtocol(H11Protocol):
    """A connection that may not keep the server waiting, and gives way where there are too many.

    A client that has sent its request and closes its side for writing is still answered.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._awaited: tuple[str, object] | None = None
        self._has_half_closed = False
        self._watch = self.loop.call_soon(self._look)
        if len(self.connections) > most_connections():
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End with the connection."""
        self._watch.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection for the answer if there is a whole request."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self._has_half_closed = True
        self.cycle.keep_alive = False
        # A client that has closed both sides sends the same. Only what is sent to it tells, and an
        # interim answer may be sent to all that speak HTTP/1.1.
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            interim = h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")
            self.transport.write(self.conn.send(interim) or b"")
        self._watch.cancel()
        self._watch = self.loop.call_later(_TICK_S / 20, self._look)
        return True

    @property
    def awaited(self) -> tuple[str, object] | None:
        """What the client owes, and for which request; None where it is the server's turn."""
        if self.transport.get_write_buffer_size():
            return "reader", self.cycle
        if self.conn.their_state is h11.IDLE:
            return "headers", self.cycle
        return ("body", self.cycle) if self.conn.their_state is h11.SEND_BODY else None

    def _look(self) -> None:
        awaited, now = self.awaited, self.loop.time()
        if awaited != self._awaited:
            self._awaited, self._since = awaited, now
        is_late = awaited is not None and now - self._since >= _PATIENCE_S[awaited[0]]
        if is_late or (self._has_half_closed and self._has_gone()):
            self.transport.abort()
            return
        self._watch = self.loop.call_later(_TICK_S, self._look)

    def _has_gone(self) -> bool:
        """Say whether the client refused what was sent after it had closed its side."""
        connection = self.transport.get_extra_info("socket")
        return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _make_room(self) -> None:
        """Close the connection that has kept the server waiting longest, or else this one."""
        waiting = [
            other
            for other in self.connections
            if isinstance(other, BoundedProtocol)
            and other is not self
            and other.awaited is not None
            and not other.transport.is_closing()
        ]
        oldest = min(waiting, key=lambda other: other._since, default=self)
        logger.warning(
            "There are more than %d connections; the one that was silent longest is closed.",
            most_connections(),
        )
        oldest.transport.abort()


class _NoRepeats(logging.Filter):
    """Passes a warning or an error once a minute; whoever causes it cannot fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        # Formats, not what is filled in: there are few. asyncio puts what differs on later lines.
        text, now = str(record.msg).partition("\n")[0], time.monotonic()
        if now - self._last.get(text, -_REPEAT_S) < _REPEAT_S:
            return False
        self._last[text] = now
        return True

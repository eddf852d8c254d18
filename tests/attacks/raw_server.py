"""A server that answers the first question as a rerank server does and then sends any bytes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = Callable[[socket.socket, dict[str, Any]], object]
"""Sends bytes on a connection in answer to a body; the connection closes if it says False."""


def reply(content: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """Return a reply as it goes over the wire."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def ranking(count: int) -> bytes:
    """Return a ranking of so many documents, each 0.5."""
    rows = [{"index": i, "relevance_score": 0.5} for i in range(count)]
    return reply(json.dumps({"results": rows, "usage": {"prompt_tokens": 400}}).encode())


def answer_well(connection: socket.socket, body: dict[str, Any]) -> None:
    """Send a ranking."""
    connection.sendall(ranking(len(body["documents"])))


class RawServer:
    """Listens on a loopback port.

    Attributes:
        answer: What is done with each request but the first question.
        is_over: Set at the end; whoever drips must stop.
        is_deaf: True to read no bodies.
    """

    def __init__(self) -> None:
        self.answer: Answer = answer_well
        self.is_over = threading.Event()
        self.is_deaf = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        """Accept connections until the end."""
        while not self.is_over.is_set():
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.is_over.set()
        self._listener.close()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            while not self.is_over.is_set():
                body = self._receive(connection)
                if (body["query"], body.get("documents")) == ("a", ["b"]):
                    connection.sendall(ranking(1))
                elif self.answer(connection, body) is False:
                    return

    def _receive(self, connection: socket.socket) -> dict[str, Any]:
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += _some(connection)
        lengths = [
            int(line.split(b":")[1])
            for line in received[:end].split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        if self.is_deaf and lengths[0] > 1_000_000:
            self.is_over.wait()
        content = bytearray(received[end + 4 :])
        while len(content) < lengths[0]:
            content += _some(connection)
        return json.loads(content)


def _some(connection: socket.socket) -> bytes:
    part = connection.recv(1 << 20)
    if not part:
        raise EOFError
    return part


@contextmanager
def raw_server() -> Iterator[RawServer]:
    """Run a server in a thread."""
    server = RawServer()
    threading.Thread(target=server.serve, daemon=True).start()
    try:
        yield server
    finally:
        server.close()

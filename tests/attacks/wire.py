"""Requests as attackers write them: raw bytes over a socket, and bodies made to be costly."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

BODY = json.dumps({"query": "q", "documents": ["a", "b"]}).encode()

COSTLY_BODIES = {
    "zeros": b'{"query":"q","documents":[' + b"0," * 4_000_000 + b"0]}",
    "objects": b'{"query":"q","documents":[' + b"{}," * 2_500_000 + b"0]}",
    "empty texts": b'{"query":"q","documents":[' + b'"",' * 2_500_000 + b'""]}',
    "lists": b'{"query":"q","texts":[' + b"[]," * 2_500_000 + b"0]}",
    "open lists": b"[" * 8_000_000,
    "open objects": b'{"a":' * 1_500_000,
    "digits": b'{"query":"q","documents":["a"],"top_n":' + b"9" * 4_000_000 + b"}",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(700_000)) + b"}",
}
"""Within the limit in bytes, and each to be refused."""

HALF_OPEN = b"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\n"


def connect(url: str) -> socket.socket:
    """Return a connection to a server."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=40)


def post(body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    """Return a request to rank, its length as given, or true."""
    named = ["Host: localhost", "Content-Type: application/json", *headers]
    named.append(f"Content-Length: {len(body) if length is None else length}")
    return ("POST /v1/rerank HTTP/1.1\r\n" + "\r\n".join(named) + "\r\n\r\n").encode() + body


def status(url: str, request: bytes, *, half_close: bool = False) -> int:
    """Send a request and return the status of its answer."""
    with connect(url) as client:
        client.sendall(request)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        return read_status(client)


def read_status(client: socket.socket) -> int:
    """Return the status of the answer that comes, 0 if the connection ends before."""
    answer = client.makefile("rb")
    while (line := answer.readline()).startswith(b"HTTP/1.1 1"):  # on the way to the answer
        while answer.readline().strip():
            pass
    return int(line.split()[1]) if line else 0

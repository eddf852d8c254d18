"""Clients that mean harm or are broken, one call of each, beside what each is to get.

Knows nothing of how long and beside whom they run: `tests.server_soak` decides that.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from tests.attacks.wire import BODY, COSTLY_BODIES, HALF_OPEN, connect, post, status

MARKS = "e\u0301\u0323\u0330"
_ENDED_S = 75.0
"""By then the slowest is ended: one that does not read its answer, after 60 s."""


def hostile_requests(key: str) -> dict[str, tuple[bytes, int]]:
    """Return whole requests by name, each with the status of its answer.

    Args:
        key: Key of the server's clients.
    """
    bearer = f"Authorization: Bearer {key}"

    def ask(**fields: object) -> bytes:
        return post(json.dumps(fields, ensure_ascii=False).encode(), bearer)

    good = post(BODY, bearer)
    foreign = good.replace(b"localhost", b"evil.example")
    bodies = {
        name: (post(body, bearer), 400 if name in _NO_SENSE else 413)
        for name, body in COSTLY_BODIES.items()
    }
    return bodies | {
        "digit query": (ask(query="1" * 4_000_000, documents=["d"]), 400),
        "query of marks": (ask(query=MARKS * 400_000, documents=["d"]), 400),
        "document of marks": (
            ask(query="q", documents=[MARKS * 400_000], max_tokens_per_doc=64),
            200,
        ),
        "too many documents": (ask(query="q", documents=["d"] * 1001), 413),
        "no JSON": (post(b"{", bearer), 422),
        "no documents": (ask(query="q"), 400),
        "wrong key": (post(BODY, "Authorization: Bearer wrong"), 401),
        "no key": (post(BODY), 401),
        "two keys": (post(BODY, bearer, bearer), 400),
        "foreign host": (foreign, 421),
        "long foreign host": (good.replace(b"localhost", b"e" * 60_000), 421),
        "two hosts": (post(BODY, bearer, "Host: evil.example"), 400),
        "text": (good.replace(b"application/json", b"text/plain"), 422),
        "no type": (good.replace(b"Content-Type: application/json\r\n", b""), 422),
        "other path": (good.replace(b"/v1/rerank", b"/%s" % (b"x" * 1000)), 404),
        "other method": (good.replace(b"POST", b"BREW"), 405),
        "half closed": (good, 200),
    }


_NO_SENSE = ("open lists", "open objects", "digits")


def send(url: str, name: str, request: bytes, expected: int) -> bool:
    """Send a request and say whether its answer is as expected."""
    try:
        return status(url, request, half_close=name == "half closed") == expected
    except (BrokenPipeError, ConnectionResetError):
        return expected == 413  # it closed the connection while we were sending


def hold(url: str, key: str, *, count: int, is_over: Callable[[], bool]) -> dict[str, bool]:
    """Keep connections waiting until the server ends them.

    Args:
        url: Address of the server.
        key: Key of its clients.
        count: Connections of each kind.
        is_over: Asked now and then whether to leave before.

    Returns:
        By kind whether all were ended in time, empty if it was over before.
    """
    bearer = f"Authorization: Bearer {key}"
    large = {"query": "q", "documents": ["d " * 3_500_000], "return_documents": True}
    unread = json.dumps(large | {"max_tokens_per_doc": 8}).encode()
    first = {
        "half-open": HALF_OPEN,
        "dripped headers": HALF_OPEN,
        "unfinished body": post(BODY[:5], bearer, length=1000),
        "dripped body": post(BODY[:5], bearer, length=1000),
        "unread answer": post(unread, bearer),
    }
    with ExitStack() as stack:
        held: dict[str, list[socket.socket]] = {}
        for kind, content in first.items():
            held[kind] = []
            for _ in range(1 if kind == "unread answer" else count):
                client = stack.enter_context(connect(url))
                client.sendall(content)
                held[kind].append(client)
        end = time.monotonic() + _ENDED_S
        while time.monotonic() < end:
            if is_over():
                return {}
            time.sleep(0.5)
            for client in held["dripped headers"] + held["dripped body"]:
                with suppress(OSError):
                    client.sendall(b"x")
        return {kind: all(map(_is_ended, clients)) for kind, clients in held.items()}


def _is_ended(client: socket.socket) -> bool:
    """Say whether the server has closed a connection, answered or not."""
    client.settimeout(2)
    try:
        while client.recv(2**20):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True

"""A real server on loopback, attacked over raw sockets; `/health` has to answer meanwhile."""

from __future__ import annotations

import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.attacks.limits import bounded
from tests.attacks.wire import BODY, COSTLY_BODIES, HALF_OPEN, connect, post, status
from tests.servers import Server, serving

pytestmark = pytest.mark.attack

NUM_FILES = 128


@pytest.fixture(scope="module")
def served(checkpoint: Callable[..., Path]) -> Iterator[Server]:
    """Return a server that may open few files."""
    limited = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({NUM_FILES},) * 2); "
        "from qwen3_reranker.cli.main import main; sys.exit(main())"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 2 * NUM_FILES
    command = (sys.executable, "-c", limited)
    with serving(checkpoint(), "--dtype", "float32", command=command) as server:
        yield server


class Health:
    """Asks for `/health` all the while and keeps the longest wait."""

    def __init__(self, server: Server) -> None:
        self._url = f"{server.url}/health"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.longest = 0.0
        self.count = self.failed = 0

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.05):
            started = time.monotonic()
            try:
                answer = httpx.get(self._url, timeout=20, headers={"Connection": "close"})
                self.failed += answer.status_code != 200
            except httpx.TransportError:
                self.failed += 1
            self.longest = max(self.longest, time.monotonic() - started)
            self.count += 1


@pytest.mark.parametrize("name", list(COSTLY_BODIES))
def test_body_within_the_limit_freezes_nothing(served: Server, name: str) -> None:
    with (
        Health(served) as health,
        bounded(seconds=10, megabytes=300, pid=served.process.pid),
    ):
        assert 400 <= status(served.url, post(COSTLY_BODIES[name])) < 500
    assert health.failed == 0
    assert health.longest < 2


def test_half_open_connections_leave_room_for_others(
    served: Server, tried: Callable[[int], None]
) -> None:
    before = len(served.log())
    with ExitStack() as stack, bounded(seconds=60, megabytes=60, pid=served.process.pid):
        for _ in range(2 * NUM_FILES):
            client = stack.enter_context(connect(served.url))
            client.sendall(HALF_OPEN)
        with Health(served) as health:
            time.sleep(3)
        assert status(served.url, post(BODY)) == 200
    assert health.count > 10
    assert health.failed == 0
    assert len(served.log()) - before < 20_000
    tried(2 * NUM_FILES)


def test_unfinished_bodies_take_no_place(served: Server, tried: Callable[[int], None]) -> None:
    with ExitStack() as stack, bounded(seconds=60, megabytes=60, pid=served.process.pid):
        for _ in range(2 * NUM_FILES):
            client = stack.enter_context(connect(served.url))
            client.sendall(post(BODY[:5], length=1000))
        with Health(served) as health:
            answers = [status(served.url, post(BODY)) for _ in range(20)]
    assert answers == [200] * 20
    assert health.failed == 0
    tried(2 * NUM_FILES)


def test_unfinished_requests_are_ended(served: Server) -> None:
    with connect(served.url) as headers, connect(served.url) as body:
        headers.sendall(b"POST /v1/rerank HTTP/1.1\r\n")
        body.sendall(post(BODY[:5], length=1000))
        started = time.monotonic()
        headers.settimeout(15)
        headers.recv(1000)  # an answer or the end
        assert time.monotonic() - started < 13
        body.settimeout(40)
        answer = body.recv(1000)
        assert time.monotonic() - started < 35
        assert answer == b"" or re.match(rb"HTTP/1.1 408", answer)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (post(BODY), 200),
        (post(BODY).replace(b"localhost", b"evil.example"), 421),
        (post(BODY).replace(b"Content-Type: application/json\r\n", b""), 422),
        (post(BODY).replace(b"application/json", b"text/plain"), 422),
        (post(BODY, "Authorization: Bearer a", "Authorization: Bearer b"), 400),
        (post(BODY, "Host: evil.example"), 400),
    ],
    ids=["plain", "foreign host", "no type", "text", "two keys", "two hosts"],
)
def test_headers_of_others_are_refused(served: Server, request_: bytes, expected: int) -> None:
    assert status(served.url, request_) == expected


def test_half_closed_client_gets_its_answer(served: Server) -> None:
    assert status(served.url, post(BODY), half_close=True) == 200

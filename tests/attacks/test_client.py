"""What a hostile, broken or slow server can do to `RemoteReranker`; who stands in whose way."""

from __future__ import annotations

import gzip
import json
import random
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import brotli
import pytest
import uvloop
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_reranker import Qwen3RerankerError, RemoteProtocolError, RemoteReranker, TimedOutError
from qwen3_reranker.client import http
from tests.attacks.interrupts import interrupt_at_random, interrupted
from tests.attacks.limits import bounded
from tests.attacks.raw_server import RawServer, answer_well, ranking, raw_server, reply

pytestmark = pytest.mark.attack

QUERY, DOCUMENTS = "which one?", ["one CANARY", "two CANARY"]
MB = 1_000_000


@pytest.fixture(scope="module")
def servers() -> Iterator[RawServer]:
    with raw_server() as server:
        yield server


@pytest.fixture
def server(servers: RawServer, monkeypatch: pytest.MonkeyPatch) -> RawServer:
    monkeypatch.delenv("QWEN3_RERANKER_API_KEY", raising=False)
    monkeypatch.setattr(http.random, "uniform", lambda low, high: high / 50)
    servers.answer = answer_well
    return servers


def drip(server: RawServer, connection: socket.socket, content: bytes) -> bool:
    """Send a byte every 50 ms, for half a minute or until the client leaves."""
    for byte in content[:600]:
        if server.is_over.wait(0.05):
            break
        connection.sendall(bytes([byte]))
    return False


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n"
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "status line": b"HTTP/1.1 200 " + b"O" * 1000,
    "headers": _HEAD + b"X: " + b"y" * 1000,
    "many headers": _HEAD + b"X: y\r\n" * 200,
    "body": ranking(2),
    "chunk size": _CHUNKED + b"0" * 1000,
    "chunks": _CHUNKED + b"1\r\n[\r\n" * 200,
}
FLOODS = {
    "informational replies": b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 1000,
}


@pytest.mark.parametrize("form", [*DRIPS, *FLOODS, "silence", "deafness"])
def test_slow_server_holds_nobody_past_the_deadline(
    server: RawServer, tried: Callable[[int], None], form: str
) -> None:
    """Nor the next call, of the same object or a new one: 8 may be under way, and 24 are tried."""

    def attack(connection: socket.socket, body: dict[str, Any]) -> object:
        if form in DRIPS:
            return drip(server, connection, DRIPS[form])
        while form in FLOODS and not server.is_over.is_set():
            connection.sendall(FLOODS[form])
        server.is_over.wait(30)
        return False

    documents = ["x" * 4 * MB] if form == "deafness" else DOCUMENTS
    server.is_deaf = form == "deafness"
    server.answer = attack
    with (
        RemoteReranker(server.url, max_in_flight=8) as reranker,
        ThreadPoolExecutor(24) as callers,
        bounded(seconds=15, megabytes=300),
    ):
        started = time.monotonic()
        calls = [
            callers.submit(reranker.rank, QUERY, documents, timeout_s=1 + i / 100)
            for i in range(24)
        ]
        for call in calls:
            assert isinstance(call.exception(), TimedOutError)
        assert time.monotonic() - started < 4
        server.answer = answer_well
        started = time.monotonic()
        assert len(reranker.rank(QUERY, DOCUMENTS)) == 2
        with RemoteReranker(server.url, model="another") as another:
            assert len(another.rank(QUERY, DOCUMENTS)) == 2
        assert time.monotonic() - started < 1
    server.is_deaf = False
    tried(24)


def test_first_question_that_is_dripped_holds_only_who_asks(
    server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller with more time asks again; it does not wait for one who has left."""
    dripped = threading.Event()
    well = RawServer._receive

    def receive(this: RawServer, connection: socket.socket) -> dict[str, Any]:
        body = well(this, connection)
        if not dripped.is_set():
            dripped.set()
            drip(server, connection, DRIPS["headers"])
            raise EOFError
        return body

    monkeypatch.setattr(RawServer, "_receive", receive)
    with RemoteReranker(server.url) as reranker, ThreadPoolExecutor(2) as callers:
        hasty = callers.submit(reranker.rank, QUERY, DOCUMENTS, timeout_s=0.5)
        assert dripped.wait(5)
        patient = callers.submit(reranker.rank, QUERY, DOCUMENTS, timeout_s=20)
        assert isinstance(hasty.exception(2), TimedOutError)
        assert len(patient.result(2)) == 2


def _packed(name: str) -> bytes:
    content = b"[" + b" " * 500 * MB
    pack: Any = {
        "gzip": gzip.compress, "deflate": zlib.compress,
        "br": lambda text: brotli.compress(text, quality=1),
        "zstd": zstandard.compress,
    }[name]  # fmt: skip
    return pack(content)


@pytest.mark.parametrize("name", ["gzip", "deflate", "br", "zstd"])
def test_packed_reply_is_not_unpacked(
    server: RawServer, tried: Callable[[int], None], name: str
) -> None:
    content = _packed(name)
    encodings = [name, name.upper(), f"{name}, {name}", f"identity, {name}", f" {name} "]
    with RemoteReranker(server.url) as reranker:
        assert len(reranker.rank(QUERY, DOCUMENTS)) == 2
        for encoding in encodings:
            packed = reply(content[:100_000], f"Content-Encoding: {encoding}")
            server.answer = lambda connection, _, packed=packed: connection.sendall(packed)
            with (
                bounded(seconds=2, megabytes=30),
                pytest.raises(RemoteProtocolError, match="compressed"),
            ):
                reranker.rank(QUERY, DOCUMENTS)
    tried(len(encodings))


LARGE: dict[str, Callable[[], bytes]] = {
    "lists": lambda: b"[" + b"[]," * 5 * MB + b"[]]",
    "objects": lambda: b"[" + b"{}," * 5 * MB + b"{}]",
    "numbers": lambda: b"[" + b"0," * 7 * MB + b"0]",
    "strings": lambda: b"[" + b'"",' * 5 * MB + b'""]',
    "keys": lambda: b"{" + b",".join(b'"%d":0' % i for i in range(1_500_000)) + b"}",
    "nesting": lambda: b"[" * 15 * MB,
    "digits": lambda: b"9" * 15 * MB,
    "a string": lambda: b'"' + b"x" * 15 * MB + b'"',
    "escapes": lambda: b'"' + rb"\u1234" * 2 * MB + b'"',
    "spaces": lambda: b" " * 15 * MB,
    "not UTF-8": lambda: b"\xff" * 15 * MB,
    "UTF-32": lambda: "[[],[]]".encode("utf-32") * 500_000,
}
SENDING: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "at once": lambda content: iter([reply(content)]),
    "in chunks": lambda content: _chunked(content, 65536),
    "in chunks of two bytes": lambda content: _chunked(content[:300_000], 2),
    "to the end of the connection": lambda content: iter([b"HTTP/1.1 200 OK\r\n\r\n", content]),
    "with a length that lies": lambda content: iter(
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999\r\n\r\n", content]
    ),
}


def _chunked(content: bytes, size: int) -> Iterator[bytes]:
    yield _CHUNKED
    parts = range(0, len(content), size)
    yield b"".join(
        b"%x\r\n%s\r\n" % (len(content[i : i + size]), content[i : i + size]) for i in parts
    )
    yield b"0\r\n\r\n"


@pytest.mark.parametrize("form", LARGE)
@pytest.mark.parametrize("documents", [2, 32], ids=["few", "long documents"])
def test_large_reply_is_refused_and_costs_little(
    server: RawServer, tried: Callable[[int], None], form: str, documents: int
) -> None:
    """Beside long documents a reply may be long: a server may send them back."""
    content = LARGE[form]()
    texts = DOCUMENTS if documents == 2 else [f"{i} " + "CANARY " * 20_000 for i in range(32)]
    # A deadline may come first: two bytes at a time take long.
    with RemoteReranker(server.url, timeout_s=10) as reranker:
        assert len(reranker.rank(QUERY, texts)) == documents
        for sending in SENDING.values():
            parts = list(sending(content))

            def attack(
                connection: socket.socket, _: dict[str, Any], parts: list[bytes] = parts
            ) -> bool:
                for part in parts:
                    connection.sendall(part)
                return False

            server.answer = attack
            with bounded(seconds=12, megabytes=120), pytest.raises(Qwen3RerankerError) as caught:
                reranker.rank(QUERY, texts)
            assert "CANARY" not in str(caught.value)
            del parts, attack
    tried(len(SENDING))


def test_long_call_lets_short_ones_between(server: RawServer) -> None:
    """One of 400 requests, eight of which are under way, and calls of one: they wait for a turn."""

    def answer(connection: socket.socket, body: dict[str, Any]) -> None:
        time.sleep(0.02)
        answer_well(connection, body)

    server.answer = answer
    with RemoteReranker(server.url) as reranker, ThreadPoolExecutor(2) as callers:
        reranker.rank(QUERY, DOCUMENTS)
        many = [str(i) for i in range(400 * 32)]
        long = callers.submit(reranker.rank, QUERY, many)
        time.sleep(0.1)
        seconds = []
        for _ in range(5):
            started = time.monotonic()
            reranker.rank(QUERY, DOCUMENTS)
            seconds.append(time.monotonic() - started)
        assert not long.done()
        assert len(long.result()) == len(many)
    assert sorted(seconds)[2] < 0.3


def _answers_in_time(reranker: RemoteReranker) -> bool:
    """Say whether another thread's call is served."""
    scores: list[list[float]] = []
    other = threading.Thread(target=lambda: scores.append(reranker.score(QUERY, DOCUMENTS)))
    other.daemon = True
    other.start()
    other.join(5)
    return scores == [[0.5, 0.5]]


# A loop that an interrupt left before its first use closes itself, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_first", [False, True], ids=["a later call", "the first call"])
def test_interrupt_anywhere_in_a_call_wedges_nothing(
    server: RawServer, tried: Callable[[int], None], is_first: bool
) -> None:
    def call(k: int) -> tuple[RemoteReranker, bool]:
        name = str(k) if is_first else None  # another name is another connection
        reranker = RemoteReranker(server.url, model=name)
        return reranker, interrupted(lambda: reranker.rank(QUERY, DOCUMENTS, timeout_s=20), k + 1)

    k = 0
    with bounded(seconds=300, megabytes=100):
        while True:
            reranker, was_interrupted = call(k)
            if not was_interrupted:
                break
            k += 1
            assert _answers_in_time(reranker), f"no answer after an interrupt at place {k}"
    assert k > 50
    tried(k)


def test_interrupts_at_random_moments_wedge_nothing(
    server: RawServer, tried: Callable[[int], None]
) -> None:
    with RemoteReranker(server.url) as reranker:

        def call() -> None:
            assert reranker.score(QUERY, DOCUMENTS, timeout_s=30) == [0.5, 0.5]

        with bounded(seconds=300, megabytes=100):
            assert interrupt_at_random(call, 10_000) == []
        assert _answers_in_time(reranker)
    tried(10_000)


def test_timeouts_under_uvloop_are_ours(server: RawServer, tried: Callable[[int], None]) -> None:
    """Its timers come up to half a millisecond early."""
    chance = random.Random(0)

    def answer(connection: socket.socket, body: dict[str, Any]) -> None:
        time.sleep(0.002)
        answer_well(connection, body)

    async def call() -> int:
        late = 0
        for _ in range(1000):
            try:
                await reranker.ascore(QUERY, DOCUMENTS, timeout_s=chance.uniform(0.001, 0.008))
            except TimedOutError:
                late += 1
        return late

    server.answer = answer
    with RemoteReranker(server.url) as reranker, bounded(seconds=60, megabytes=50):
        reranker.score(QUERY, DOCUMENTS)
        assert 10 < uvloop.run(call()) < 990
    tried(1000)


_SCRAPS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 500 X\r\n", b"HTTP/1.1 101 X\r\n", b"HTTP/1.1 100 X\r\n",
        b"HTTP/1.0 200 OK\r\n", b"HTTP/2 200\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/1.1 304 No\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::\r\n", b"\r\n", b"\r\n\r\n", b"0\r\n\r\n",
        b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: x\r\n",
        b"Content-Length: 1\r\nContent-Length: 2\r\n", b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n", b"Content-Encoding: br\r\n", b"Retry-After: 1e999\r\n",
        b"Retry-After: nan\r\n", b"Set-Cookie: a=b\r\n", b"Connection: close\r\n", b"X\r\n",
        b": y\r\n", b" folded\r\n", b"\x00", b"5\r\nCANAR\r\n", b"ffffffffffffffff\r\n",
        b"null", b"[]", b"{}", b"[[[[", b'{"results":', b'"CANARY"', b"1e999", b"NaN",
        ranking(2), ranking(1),
    ]
)  # fmt: skip
_NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, 2, -1, 0.5, True, 10**400, "0", None])
)
_ROWS = st.fixed_dictionaries(
    {},
    optional={
        "index": _NUMBERS | st.sampled_from([0, 1]),
        "relevance_score": _NUMBERS,
        "score": _NUMBERS,
        "log_odds": _NUMBERS,
        "truncated": _NUMBERS,
    },
)
_ANSWERS = st.recursive(
    _NUMBERS | st.text(max_size=5) | st.lists(_ROWS, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["results", "usage", "index", "score", "prompt_tokens", "data"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def _shuffled(rows: list[dict[str, Any]]) -> bytes:
    return reply(json.dumps({"results": rows}).encode())


WIRE = st.one_of(
    st.lists(_SCRAPS | st.binary(max_size=8), max_size=6).map(b"".join),
    st.builds(lambda answer: reply(json.dumps(answer).encode()), _ANSWERS),
    st.lists(_ROWS, min_size=2, max_size=2).map(_shuffled),
    st.builds(
        lambda at, change: ranking(2)[:at] + change + ranking(2)[at + 1 :],
        st.integers(0, len(ranking(2))),
        st.binary(max_size=2),
    ),
)


def test_any_reply_is_scores_or_an_error_of_ours(
    server: RawServer, tried: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_ATTEMPTS", 1)
    replies, messages = 0, set[str]()
    reranker = RemoteReranker(server.url, timeout_s=5)
    reranker.score(QUERY, DOCUMENTS)

    @settings(
        max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(WIRE)
    def attack(wire: bytes) -> None:
        nonlocal replies
        replies += 1

        def answer(connection: socket.socket, _: dict[str, Any]) -> bool:
            connection.sendall(wire)
            return False

        server.answer = answer
        try:
            scores = reranker.score(QUERY, DOCUMENTS)
        except TimedOutError:
            raise
        except Qwen3RerankerError as error:
            messages.add(str(error))
        else:
            assert len(scores) == 2
            assert all(0 <= score <= 1 for score in scores)

    # Nearly all of it is what Hypothesis remembers of 10,000 examples.
    with bounded(seconds=400, megabytes=400, log_bytes=MB):
        attack()
    reranker.close()
    assert not any("CANARY" in message for message in messages)
    assert len(messages) > 5
    tried(replies)

"""JSON over HTTP to one server: a pool, a deadline, retries, and what may come back.

Decides when a request is tried again and when it is given up. Knows nothing of reranking. What
travels, the key and a server's own words never stand in an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import ssl
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, partial
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from .errors import (
    MissingExtraError,
    OverloadedError,
    Qwen3RerankerError,
    RemoteError,
    RemoteProtocolError,
    TimedOutError,
)

try:
    import httpx
except ModuleNotFoundError as error:
    raise MissingExtraError.of("RemoteReranker", error.name, "remote") from error

MAX_REPLY_BYTES = 16 * 1024 * 1024
_MOST_NODES = 400_000
"""Lists and objects of a reply; its strings, numbers and keys are bounded by its bytes alone."""
_ATTEMPTS = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_LONGEST_WAIT_S = 300.0
"""What a server may ask for by Retry-After; longer is a refusal."""
_CONNECT_S = 5.0
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_HINTS = {
    400: "It does not take such requests, or texts of this length.",
    422: "It does not take such requests, or texts of this length.",
    401: "Set api_key, or QWEN3_RERANKER_API_KEY.",
    403: "Ask its operator for a key that may rerank.",
    404: "Check the URL, and the model name if the server checks it.",
    413: "Send fewer documents per request, or shorter ones.",
}
_Result = TypeVar("_Result")
_Work: TypeAlias = tuple[Future[Any], Callable[[], Any]]


class _TransientError(Exception):
    """A try failed in a way that another may not."""

    def __init__(self, error: Qwen3RerankerError, pause_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.pause_s = pause_s


class _Threads:
    """Threads that work off a queue; daemons, or the end of a process would wait for a server.

    Args:
        size: Threads at most.
    """

    def __init__(self, size: int) -> None:
        self._left = size
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()

    def submit(self, work: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Run work in one of the threads, in the order submitted."""
        future: Future[_Result] = Future()
        self._waiting.put((future, partial(work, *args)))
        with self._lock:
            if self._left:
                self._left -= 1
                name = "qwen3-reranker-remote"
                threading.Thread(target=_run, args=(self._waiting,), name=name, daemon=True).start()
        return future

    def stop(self) -> None:
        """Drop what waits, and let the threads end after what they are at, unawaited."""
        with contextlib.suppress(queue.Empty):
            while work := self._waiting.get_nowait():
                work[0].cancel()
        self._waiting.put(None)


def _run(waiting: queue.SimpleQueue[_Work | None]) -> None:
    while work := waiting.get():
        future, call = work
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del work, future, call  # an idle thread holds nothing
    waiting.put(None)  # for the next


class Connection:
    """A pool of connections and of threads that wait for replies; used from any thread or loop.

    Threads, not coroutines, wait: one pool then serves every event loop and none, and a caller
    leaves at its deadline whatever a server drips.

    Args:
        api_key: Sent as bearer token; None sends none.
        max_in_flight: Requests under way at a time.
    """

    def __init__(self, api_key: str | None, max_in_flight: int) -> None:
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._max_in_flight = max_in_flight
        self._pid: int | None = None
        self._open()

    def _open(self) -> None:
        """Make both pools; a forked child needs its own."""
        if self._pid == os.getpid():
            return
        pid = os.getpid()
        self._client = httpx.Client(
            headers={
                **self._headers,
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # a few packed bytes would hold gigabytes
            },
            follow_redirects=False,
            verify=_certificates(),
            limits=httpx.Limits(
                max_connections=self._max_in_flight,
                max_keepalive_connections=self._max_in_flight,
            ),
        )
        self._threads = _Threads(self._max_in_flight)
        weakref.finalize(self, _close, self._client, self._threads, pid)
        self._pid = pid  # last: until then other threads of a forked child make pools, too

    def submit(self, work: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Run work in one of the threads, in the order submitted."""
        self._open()
        return self._threads.submit(work, *args)

    def post(
        self,
        url: str,
        body: Mapping[str, Any],
        deadline: float,
        gone: threading.Event | None = None,
    ) -> Any:
        """Return the parsed reply to a request, tried three times if need be.

        Args:
            url: Where it goes; redirects are not followed.
            body: What it asks, as JSON.
            deadline: When it is given up, on the monotonic clock.
            gone: Set when nobody waits any more, so that it is not tried again.

        Raises:
            TimedOutError: If the deadline comes first.
            OverloadedError: If the server has too much to do.
            RemoteError: If it cannot be reached, or refuses; `status` says how.
            RemoteProtocolError: If the reply is no JSON, or too long.
        """
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        gone = gone or threading.Event()
        for attempt in range(_ATTEMPTS):
            try:
                return self._post_once(url, content, deadline)
            except _TransientError as failed:
                pause = failed.pause_s
                if pause is None:
                    longest = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
                    pause = random.uniform(0, longest)  # noqa: S311
                too_late = pause > _LONGEST_WAIT_S or monotonic() + pause >= deadline
                if attempt == _ATTEMPTS - 1 or too_late or gone.wait(pause):
                    raise failed.error from failed.__cause__
        raise AssertionError("unreachable")

    def _post_once(self, url: str, content: bytes, deadline: float) -> Any:
        left = deadline - monotonic()
        if left <= 0:
            raise _late()
        seconds = None if left == float("inf") else left
        timeout = httpx.Timeout(seconds, connect=min(left, _CONNECT_S))
        try:
            with self._client.stream("POST", url, content=content, timeout=timeout) as reply:
                if reply.status_code != 200:
                    raise _refused(reply.status_code, reply.headers.get("retry-after"))
                received = _read(reply, deadline)
        except httpx.ConnectTimeout as error:
            raise _TransientError(_unreachable(error)) from error
        except httpx.TimeoutException as error:
            raise _late() from error
        except httpx.TransportError as error:
            raise _TransientError(_unreachable(error)) from error
        if received.count(b"[") + received.count(b"{") > _MOST_NODES:
            raise RemoteProtocolError(
                f"the server's reply has more than {_MOST_NODES} lists and objects, which no "
                "ranking has. Check that the URL is a rerank server's."
            )
        try:
            return json.loads(received)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(
                f"the server's reply is no JSON ({len(received)} bytes). Check that the URL is a "
                "rerank server's."
            ) from error


@cache
def _certificates() -> ssl.SSLContext:
    # To read them takes a tenth of a second; every client would, even for plain http.
    return httpx.create_ssl_context()


def is_address(url: str) -> bool:
    """Say whether requests can go to a URL, and any machine would read it alike."""
    try:
        return bool(httpx.URL(url).host)
    except (httpx.InvalidURL, ValueError):
        return False


def _close(client: httpx.Client, threads: _Threads, pid: int) -> None:
    if os.getpid() != pid:  # a fork's copies; the sockets are the parent's
        return
    threads.stop()
    client.close()


def _read(reply: httpx.Response, deadline: float) -> bytes:
    encoding = reply.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RemoteProtocolError(
            "the server's reply is compressed, which it was asked not to be, and is not unpacked. "
            "Look at the proxies between."
        )
    parts, size = [], 0
    for part in reply.iter_raw():
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise RemoteProtocolError(
                f"the server's reply is longer than {MAX_REPLY_BYTES} bytes. Send fewer documents "
                "per request."
            )
        if monotonic() > deadline:
            raise _late()
    return b"".join(parts)


def _refused(status: int, retry_after: str | None) -> Exception:
    hint = _HINTS.get(status, "Its log says why.")
    if 300 <= status < 400:
        hint = "Redirects are not followed: give the URL where the server is."
    error: Qwen3RerankerError = RemoteError(
        f"the server answered with status {status}. {hint}", status=status
    )
    if status == 429:
        error = OverloadedError(
            "the server has too much to do (status 429). Try again later, or lower max_in_flight."
        )
    return _TransientError(error, _pause_s(retry_after)) if status in _RETRIED else error


def _unreachable(error: Exception) -> RemoteError:
    return RemoteError(
        f"the server cannot be reached ({type(error).__name__}). Check the URL and that it runs."
    )


def _late() -> TimedOutError:
    return TimedOutError(
        "the server did not answer within timeout_s. Allow more time, or send fewer documents."
    )


def _pause_s(retry_after: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which has seconds or a date.

    Example:
        >>> _pause_s("2"), _pause_s("-5"), _pause_s("soon"), _pause_s(None)
        (2.0, 0.0, None, None)
    """
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except (ValueError, OverflowError):
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if seconds == seconds else None

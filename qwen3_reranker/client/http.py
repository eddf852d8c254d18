"""JSON over HTTP to one server: a pool, a deadline, retries, and what may come back.

Decides when a request is tried again and when it is given up. Knows nothing of reranking. What
travels, the key and a server's own words never stand in an error.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import json
import os
import random
import ssl
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import CancelledError
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from ..call.futures import LockFreeFuture
from ..errors import (
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
_REPLY_BYTES, _DOCUMENT_BYTES, _ECHO = 64 * 1024, 4 * 1024, 6
"""What a reply may have at all, for each document, and for each byte sent: servers send texts back,
and a byte of them takes six where it is written as an escape."""
_REPLY_VALUES, _DOCUMENT_VALUES = 1000, 100
"""Values a reply may have at all and for each document, beside the marks of texts sent back."""
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
Result = TypeVar("Result")


class _TransientError(Exception):
    """A try failed in a way that another may not."""

    def __init__(self, error: Qwen3RerankerError, pause_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.pause_s = pause_s


class HttpClient:
    """Reaches one server from any thread and event loop, over connections that all share.

    Args:
        api_key: Sent as bearer token; None sends none.
        max_in_flight: Requests under way at a time.
    """

    def __init__(self, api_key: str | None, max_in_flight: int) -> None:
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._max_in_flight = max_in_flight
        self._loops: dict[int, RequestLoop] = {}  # by process: a forked child needs its own

    def submit(
        self,
        work: Work[Result],
        deadline: float | None,
        on_done: Callable[[], object] | None = None,
    ) -> LockFreeFuture[Result]:
        """Begin work that makes requests.

        Args:
            work: Coroutine function of the loop it may use.
            deadline: When it is given up, on the monotonic clock; None for never.
            on_done: Called once, by another thread, when there is a result or an error.

        Returns:
            Its future, which raises TimedOutError after the deadline. Abandoning it ends the work.
        """
        pid = os.getpid()
        loop = self._loops.get(pid)
        if loop is None:
            loop = RequestLoop(self._headers, self._max_in_flight)
            weakref.finalize(self, loop.stop)
            loop = self._loops.setdefault(pid, loop)  # atomic: concurrent first calls share one
        return loop.submit(work, deadline, on_done)


class RequestLoop:
    """A thread whose event loop makes one process's requests.

    The loop is its own, so that one pool serves every caller's loop and those without. A task of
    it can be ended wherever it is: while it connects, sends, or reads a reply that drips.

    Args:
        headers: Sent with every request.
        max_in_flight: Places for requests.

    Attributes:
        max_in_flight: As given.
        places: One for each request that may be under way.
        first: Held by whoever asks what the server understands.
    """

    def __init__(self, headers: Mapping[str, str], max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.places = asyncio.Semaphore(max_in_flight)
        self.first = asyncio.Lock()
        self._client = httpx.AsyncClient(
            headers={
                **headers,
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # a few packed bytes would hold gigabytes
            },
            follow_redirects=False,
            verify=_certificates(),
            timeout=httpx.Timeout(None, connect=_CONNECT_S),  # the deadline is the whole task's
            # No limit of the pool's: `places` is one, and what the pool counts is not given back
            # by a request that is cancelled at the wrong moment.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._pid = os.getpid()
        self._loop = asyncio.SelectorEventLoop()  # not uvloop's: its timers come early
        self._over = asyncio.Event()
        self._is_running = False
        self._unclaimed = [None]  # popped by whoever runs the loop or closes it unused

    def submit(
        self, work: Work[Result], deadline: float | None, on_done: Callable[[], object] | None
    ) -> LockFreeFuture[Result]:
        """Begin work, as `HttpClient.submit`."""
        future = _Future[Result](self._loop, on_done)
        self._loop.call_soon_threadsafe(self._begin, future, work, deadline)
        if not self._is_running:
            # Of several that start at once one goes on. Not `Thread.start`: an interrupt may tear
            # its lock.
            _thread.start_new_thread(self._run, ())
        return future

    def stop(self) -> None:
        """End what is under way and give up the connections, unawaited."""
        if os.getpid() != self._pid:  # a fork's copy; the sockets are the parent's
            return
        if self._claim():
            self._loop.close()
        else:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._over.set)

    async def post(self, url: str, body: Mapping[str, Any], deadline: float | None) -> Any:
        """Return the parsed reply to a request, tried three times if need be.

        Args:
            url: Where it goes; redirects are not followed.
            body: What it asks, as JSON; has the documents in a list.
            deadline: As `submit`; nothing is tried again that would come after it.

        Raises:
            OverloadedError: If the server has too much to do.
            RemoteError: If it cannot be reached, or refuses; `status` says how.
            RemoteProtocolError: If the reply is no JSON, or longer than a ranking can be.
        """
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        documents = sum(len(value) for value in body.values() if isinstance(value, list))
        for attempt in range(_ATTEMPTS):
            try:
                received = await self._post_once(url, content, documents)
                return _parse(received, content, documents)
            except _TransientError as failed:
                pause = failed.pause_s
                if pause is None:
                    longest = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
                    pause = random.uniform(0, longest)  # noqa: S311
                too_late = deadline is not None and monotonic() + pause >= deadline
                if attempt == _ATTEMPTS - 1 or too_late or pause > _LONGEST_WAIT_S:
                    raise failed.error from failed.__cause__
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _post_once(self, url: str, content: bytes, documents: int) -> bytearray:
        most = _REPLY_BYTES + documents * _DOCUMENT_BYTES + len(content) * _ECHO
        try:
            async with self._client.stream("POST", url, content=content) as reply:
                if reply.status_code != 200:
                    raise _refused(reply.status_code, reply.headers.get("retry-after"))
                return await _read(reply, min(most, MAX_REPLY_BYTES))
        except httpx.TransportError as error:
            raise _TransientError(_unreachable(error)) from error

    def _begin(self, future: _Future[Any], work: Work[Any], deadline: float | None) -> None:
        if not future.is_abandoned:
            future.task = self._loop.create_task(self._do(future, work, deadline))

    async def _do(self, future: _Future[Any], work: Work[Any], deadline: float | None) -> None:
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    result = await work(self)
            except TimeoutError as error:
                raise _late() from error
        except asyncio.CancelledError:
            future.set_exception(CancelledError())
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            future.task = None
            del future  # or an error's traceback would lead back to it

    def _claim(self) -> bool:
        try:
            self._unclaimed.pop()
        except IndexError:
            return False
        return True

    def _run(self) -> None:
        if self._claim():
            self._is_running = True
            threading.current_thread().name = "qwen3-reranker-remote"
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._until_over())

    async def _until_over(self) -> None:
        await self._over.wait()
        await self._client.aclose()


Work: TypeAlias = Callable[[RequestLoop], Awaitable[Result]]


class _Future(LockFreeFuture[Result]):
    """A future whose work ends when its caller leaves.

    Attributes:
        task: What makes the result; the loop's alone, None before and after.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_done: Callable[[], object] | None
    ) -> None:
        super().__init__(on_done)
        self.task: asyncio.Task[None] | None = None
        self._loop = loop

    def abandon(self) -> None:
        super().abandon()
        if not self.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


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


async def _read(reply: httpx.Response, most: int) -> bytearray:
    encodings = reply.headers.get("content-encoding", "").lower().split(",")
    if any(encoding.strip() not in ("", "identity") for encoding in encodings):
        raise RemoteProtocolError(
            "the server's reply is compressed, which it was asked not to be, and is not unpacked. "
            "Look at the proxies between."
        )
    received = bytearray()
    async for part in reply.aiter_raw():
        received += part
        if len(received) > most:
            raise RemoteProtocolError(
                f"the server's reply is longer than {most} bytes, which a ranking of what was "
                "sent is not. Send fewer documents per request, or check that the URL is a rerank "
                "server's."
            )
    return received


def _parse(received: bytearray, content: bytes, documents: int) -> Any:
    """Return what a reply says, if it can be a ranking.

    A few million empty lists are a small reply and half a gigabyte of objects.
    """
    most = _REPLY_VALUES + documents * _DOCUMENT_VALUES + _count_marks(content)
    if _count_marks(received) > most:
        raise RemoteProtocolError(
            f"the server's reply has more than {most} values, which no ranking of {documents} "
            "documents has. Check that the URL is a rerank server's."
        )
    try:
        return json.loads(received)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(
            f"the server's reply is no JSON ({len(received)} bytes). Check that the URL is a "
            "rerank server's."
        ) from error


def _count_marks(text: bytes | bytearray) -> int:
    """Count what begins a list, an object or their next value: no text of JSON has more values."""
    return sum(text.count(mark) for mark in (b"[", b"{", b","))


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

"""What stands before the server's routes: the log, the key, the queue's limit, the body's limit.

Decides who is let in and what is written about a request: method, known path, status, time. Knows
nothing of what a request asks.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import Counter
from collections.abc import Container
from time import monotonic

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .schemas import RefusedError, ServerLimits, error_answer

logger = logging.getLogger(__name__)

OPEN_PATH = "/health"
RETRY_AFTER_S = 1
CLIENT_GONE = 499
"""A status of nginx's; nobody is there to read it."""

# Where one is sent twice, a proxy and this server may each believe another one.
_SINGLE = (b"authorization", b"content-length", b"content-type", b"host", b"transfer-encoding")


_MOST_ALIKE = 60
_MINUTE_S = 60.0


class RequestLog:
    """Writes down and counts the answers of an application, whoever in it gives them.

    Of many that are alike in a minute the first 60 get a line and the others a number, so that no
    client can fill the disk.

    Args:
        app: The application.
        known_paths: Paths that may be written down; any other could be text of a user.
        metrics: Told of every request.
    """

    def __init__(self, app: ASGIApp, *, known_paths: Container[str], metrics: Metrics) -> None:
        self._app = app
        self._known_paths = known_paths
        self._metrics = metrics
        self._since = monotonic()
        self._counts: Counter[tuple[str, str, int]] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = monotonic(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            seconds = monotonic() - started
            path = scope["path"] if scope["path"] in self._known_paths else "other"
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self._write(method, path, status, seconds)
            self._metrics.record_request(path, status, seconds)

    def _write(self, method: str, path: str, status: int, seconds: float) -> None:
        if monotonic() - self._since >= _MINUTE_S:
            for alike, count in self._counts.items():
                if count > _MOST_ALIKE:
                    logger.info("%s %s %d: %d more in a minute", *alike, count - _MOST_ALIKE)
            self._counts.clear()
            self._since = monotonic()
        self._counts[method, path, status] += 1
        if self._counts[method, path, status] <= _MOST_ALIKE:
            logger.info("%s %s %d %.0f ms", method, path, status, 1000 * seconds)


class Guard:
    """Lets requests through to an application.

    Args:
        app: The application.
        api_key: What `Authorization: Bearer` must carry on every path but health; None is open.
        limits: Sizes past which a request is refused.
        metrics: Told how many requests wait.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        limits: ServerLimits,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._expected = None if api_key is None else f"bearer {api_key}".encode()
        self._limits = limits
        self._metrics = metrics
        self._waiting = 0
        self._arriving: dict[asyncio.Timeout, int] = {}  # bytes by the end of a body's time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(receive)
        except RefusedError as error:
            refusal = _refuse(error.status, str(error), {"Connection": "close"})
        else:
            refusal = self._refusal_of_the_queue()  # it may have filled up meanwhile
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._waiting += 1
        self._metrics.waiting.set(self._waiting)
        try:
            await self._app(scope, _after(body, receive), send)
        finally:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        counts = Counter(name for name, _ in scope["headers"])
        doubled = next((name.decode() for name in _SINGLE if counts[name] > 1), None)
        if doubled is not None:
            return _refuse(400, f"the header {doubled} is sent more than once. Send it once.")
        if scope["path"] != OPEN_PATH and not self._is_known(headers.get(b"authorization", b"")):
            return _refuse(
                401,
                "the API key is missing or wrong. Send the header 'Authorization: Bearer KEY'.",
                {"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            return _refuse(413, self._too_large())
        return self._refusal_of_the_queue() if scope["method"] == "POST" else None

    def _refusal_of_the_queue(self) -> JSONResponse | None:
        if self._waiting < self._limits.waiting:
            return None
        return _refuse(
            429,
            f"{self._limits.waiting} requests wait already. Try again later.",
            {"Retry-After": str(RETRY_AFTER_S)},
        )

    def _is_known(self, given: bytes) -> bool:
        if self._expected is None:
            return True
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(scheme.lower() + b" " + key, self._expected)

    async def _read(self, receive: Receive) -> bytes:
        """Return the whole body; until it is there, a request has no place in the queue.

        Raises:
            RefusedError: If it is too large or too slow, or the client goes away.
        """
        parts: list[bytes] = []
        size = 0
        deadline = asyncio.timeout(self._limits.body_s)
        try:
            async with deadline:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedError(CLIENT_GONE, "the client has gone.")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._limits.body_bytes:
                        raise RefusedError(413, self._too_large())
                    if not message.get("more_body", False):
                        return b"".join(parts)
                    self._arriving[deadline] = size
                    self._make_room()
        except TimeoutError:
            raise RefusedError(
                408,
                "the body was not complete in time, or too many others were on their way. Send "
                "less per request, or try again.",
            ) from None
        finally:
            self._arriving.pop(deadline, None)

    def _make_room(self) -> None:
        """End the time of the oldest bodies on their way while all of them are too large."""
        excess = sum(self._arriving.values()) - self._limits.arriving_bytes
        while excess > 0:
            oldest = next(iter(self._arriving))
            excess -= self._arriving.pop(oldest)
            if not oldest.expired():  # else its time has just ended by itself
                oldest.reschedule(0)

    def _too_large(self) -> str:
        return (
            f"the body is larger than {self._limits.body_bytes} bytes. Send fewer or shorter "
            "documents per request."
        )


def _after(body: bytes, receive: Receive) -> Receive:
    """Return what gives the whole body, and then what `receive` gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return messages.pop() if messages else await receive()

    return receiving


def _refuse(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_answer(status, message), status, headers)

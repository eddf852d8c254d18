"""What stands before the server's routes: the key, the queue's limit, the body's limit, the log.

Decides who is let in and what is written about a request: method, known path, status, time. Knows
nothing of what a request asks.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Container
from time import monotonic

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .protocol import ServerLimits, error_answer

logger = logging.getLogger(__name__)

OPEN_PATH = "/health"
RETRY_AFTER_S = 1


class Guard:
    """Lets requests through to an application.

    Args:
        app: The application.
        api_key: What `Authorization: Bearer` must carry on every path but health; None is open.
        limits: Sizes past which a request is refused.
        known_paths: Paths that may be written down; any other could be text of a user.
        metrics: Told of every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        limits: ServerLimits,
        known_paths: Container[str],
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._expected = None if api_key is None else f"bearer {api_key}".encode()
        self._limits = limits
        self._known_paths = known_paths
        self._metrics = metrics
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
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
            await self._answer(scope, receive, sending)
        finally:
            seconds = monotonic() - started
            path = scope["path"] if scope["path"] in self._known_paths else "other"
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            logger.info("%s %s %d %.0f ms", method, path, status, 1000 * seconds)
            self._metrics.record_request(path, status, seconds)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._waiting += 1
        self._metrics.waiting.set(self._waiting)
        try:
            await self._app(scope, self._counted(receive), send)
        finally:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if scope["path"] != OPEN_PATH and not self._is_known(headers.get(b"authorization", b"")):
            return _refuse(
                401,
                "the API key is missing or wrong. Send the header 'Authorization: Bearer KEY'.",
                {"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            return _refuse(413, self._too_large())
        if scope["method"] == "POST" and self._waiting >= self._limits.waiting:
            return _refuse(
                429,
                f"{self._limits.waiting} requests wait already. Try again later.",
                {"Retry-After": str(RETRY_AFTER_S)},
            )
        return None

    def _is_known(self, given: bytes) -> bool:
        if self._expected is None:
            return True
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(scheme.lower() + b" " + key, self._expected)

    def _counted(self, receive: Receive) -> Receive:
        """Return `receive` for as long as the body is within its limit."""
        size = 0

        async def counting() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limits.body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counting

    def _too_large(self) -> str:
        return (
            f"the body is larger than {self._limits.body_bytes} bytes. Send fewer or shorter "
            "documents per request."
        )


def _refuse(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_answer(status, message), status, headers)

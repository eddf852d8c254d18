"""What stands before the web page's routes: which requests there are, and the files they send.

Gradio has some sixty routes, and the page calls eight. Some of the others read files of this
machine or call other hosts, and an unexpected value ends up in its log. So a request is let through
only if the page itself could have sent it, and Gradio never sees the path of a file. Knows nothing
of Gradio's components and of ranking.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES = 8_000_000
"""Of one request: what is typed, or a file."""

_BODIES = 8  # on their way at once; the page sends one at a time
_BODY_S = 30  # less than `listening` leaves a connection, so that there is an answer
_FILES = 16
_FORM_BYTES = 4_000  # around a file

_PAGE = re.compile(
    r"/|/favicon\.ico|/theme\.css|/static/js/iframeResizer\.contentWindow\.min\.js"
    r"|/assets/[\w-]+(\.[\w-]+)+",
    re.ASCII,
)
_API = "/gradio_api"
_RESULTS = f"{_API}/queue/data"
_SESSION = re.compile(r"\w{1,64}", re.ASCII)
_TOLD = 'data: {"msg": "done"}\n\n'
_TOO_LARGE = (
    f"the text or file is larger than {BODY_BYTES:,} bytes. Rank a part of it, or use the command "
    "`qwen3-reranker rank`."
)

Fits = Callable[[Any], bool]
"""Says whether the page could have sent this as the value of an input."""


class Click(NamedTuple):
    """What the page sends when something is clicked.

    Attributes:
        path: Where it is sent.
        inputs: What each value must be.
        file: Position of the file, if there is one. Gradio gets None in its place, and the name of
            the file in `Uploads` as the next value.
    """

    path: str
    inputs: Sequence[Fits]
    file: int | None = None


class Uploads:
    """Keeps the files that were sent, each under a name that only its sender is told.

    What a client names is looked up here and is never used as a path. The newest files are kept.

    Args:
        folder: Where they are kept; whoever made it removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: OrderedDict[str, Path] = OrderedDict()

    def keep(self, name: str, content: bytes) -> str:
        """Keep a file and return the name to ask for it.

        Args:
            name: As its sender calls it; errors repeat it.
            content: What is in it.
        """
        key = secrets.token_hex(16)
        folder = self._folder / key
        folder.mkdir(mode=0o700)
        # The end of it says how it is read.
        file = folder / (re.sub(r"[^\w.-]", "_", name)[-60:].lstrip(".") or "file")
        file.write_bytes(content)
        self._files[key] = file
        while len(self._files) > _FILES:
            _, oldest = self._files.popitem(last=False)
            oldest.unlink(missing_ok=True)
            oldest.parent.rmdir()
        return key

    def path(self, key: str) -> Path | None:
        """Return where a file is kept; None if there is none of this name, or no longer."""
        return self._files.get(key)


class PageGuard:
    """Lets through what the page itself sends, and answers uploads.

    Args:
        app: The application.
        clicks: What may be clicked, by Gradio's number of it.
        uploads: Keeps the files.
    """

    def __init__(self, app: ASGIApp, *, clicks: Mapping[int, Click], uploads: Uploads) -> None:
        self._app = app
        self._clicks = clicks
        self._uploads = uploads
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._own_answer(scope, receive)
        except HTTPException as error:
            answer = refuse(error.detail, error.status_code)
        if isinstance(answer, Response):
            await answer(scope, receive, send)
            return
        try:
            await self._app(*answer, send)
        except RuntimeError:
            if scope["path"] != _RESULTS:
                raise
            # Gradio has begun its answer when it finds that there is no such session.
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _own_answer(self, scope: Scope, receive: Receive) -> Response | tuple[Scope, Receive]:
        """Return the answer to a request, or the request as Gradio may see it.

        Raises:
            HTTPException: If it is refused.
        """
        method, path = scope["method"], scope["path"]
        query = scope["query_string"].decode("latin-1")
        if method == "GET" and _PAGE.fullmatch(path):
            return {**scope, "query_string": b""}, receive  # some names in it load files
        if method == "GET" and path == _RESULTS:
            sessions = parse_qs(query).get("session_hash", [])
            if len(sessions) == 1 and _SESSION.fullmatch(sessions[0]):
                return {**scope, "query_string": f"session_hash={sessions[0]}".encode()}, receive
        elif method == "GET" and path == f"{_API}/upload_progress":
            return PlainTextResponse(_TOLD, media_type="text/event-stream")
        elif method == "POST" and path == f"{_API}/upload":
            body = await self._read(scope, receive, BODY_BYTES + _FORM_BYTES)
            return await self._upload(scope, body)
        elif method == "POST" and path in (click.path for click in self._clicks.values()):
            body = await self._read(scope, receive, BODY_BYTES)
            body = await run_in_threadpool(self._click, path, body)
            kind = [(b"content-type", b"application/json")]
            others = [(n, v) for n, v in scope["headers"] if n != b"content-type"]
            return _with_body({**scope, "headers": others + kind}, body, receive)
        raise HTTPException(404, "there is no such address. The page is at /.")

    async def _read(self, scope: Scope, receive: Receive, limit: int) -> bytes:
        declared = Headers(scope=scope).get("content-length", "0")
        size = int(declared) if declared.isdecimal() else 0
        if size > limit:
            raise HTTPException(413, _TOO_LARGE)
        if self._arriving >= _BODIES:
            raise HTTPException(503, f"{_BODIES} requests arrive already. Try again later.")
        parts, size = [], 0
        self._arriving += 1
        try:
            async with asyncio.timeout(_BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HTTPException(400, "the client has gone.")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise HTTPException(413, _TOO_LARGE)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise HTTPException(408, f"the request took over {_BODY_S} s. Try again.") from None
        finally:
            self._arriving -= 1

    async def _upload(self, scope: Scope, body: bytes) -> Response:
        scope, receive = _with_body(scope, body, _nothing)
        async with Request(scope, receive).form(max_files=1, max_fields=0) as form:
            file = form.get("files")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "there is no file in the upload. Choose one on the page.")
            content = await file.read()
        name = file.filename or ""
        return JSONResponse([await run_in_threadpool(self._uploads.keep, name, content)])

    def _click(self, path: str, body: bytes) -> bytes:
        """Return the body of a click with nothing in it that the page would not send."""
        try:
            sent = json.loads(body)
            click = self._clicks[sent["fn_index"]]
            session, trigger, values = sent["session_hash"], sent.get("trigger_id"), sent["data"]
            fits = (
                click.path == path
                and _SESSION.fullmatch(session)
                and (trigger is None or type(trigger) is int)
                and type(values) is list
                and len(values) == len(click.inputs)
                and all(fit(value) for fit, value in zip(click.inputs, values, strict=True))
            )
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise HTTPException(422, "this is not what the page sends. Load the page again.")
        if click.file is not None:
            file = values[click.file]
            values[click.file : click.file + 2] = None, None if file is None else file["path"]
        kept = {"fn_index": sent["fn_index"], "session_hash": session, "trigger_id": trigger}
        return json.dumps({**kept, "data": values}).encode()


def is_upload(value: Any) -> bool:
    """Say whether a value describes a file as the page does, or says that there is none."""
    return value is None or (isinstance(value, dict) and isinstance(value.get("path"), str))


def refuse(fault: str, status: int = 403) -> Response:
    """Return the answer to a request that is not let through."""
    return JSONResponse({"detail": fault}, status)


def _with_body(scope: Scope, body: bytes, receive: Receive) -> tuple[Scope, Receive]:
    """Return a request with this body, after which it gives what `receive` gives."""
    headers = [
        (n, v) for n, v in scope["headers"] if n not in (b"content-length", b"transfer-encoding")
    ]
    headers.append((b"content-length", str(len(body)).encode()))
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return messages.pop() if messages else await receive()

    return {**scope, "headers": headers}, receiving


async def _nothing() -> Message:
    return {"type": "http.disconnect"}

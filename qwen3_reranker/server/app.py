"""A rerank server on one model: `qwen3-reranker serve`.

Decides the routes, and what becomes of a request whose client goes away. Shapes are `schemas`',
admission is `middleware`'s, and scoring is the reranker's.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException

from .. import __version__
from ..call import arguments
from ..errors import InputError, Qwen3RerankerError
from ..reranker import Reranker
from ..web.hosts import AllowedHosts, is_loopback
from ..web.listening import check_address, server_config
from ..web.memory import keep_little
from .metrics import Metrics
from .middleware import CLIENT_GONE, OPEN_PATH, RETRY_AFTER_S, Guard, RequestLog
from .schemas import (
    ErrorAnswer,
    RefusedError,
    RerankAnswer,
    RerankRequest,
    ScoreAnswer,
    ScoreRequest,
    ServerLimits,
    TeiResult,
    check_count,
    error_answer,
    jina_answer,
    parse_body,
    score_answer,
    status_of,
    tei_answer,
)

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 30
# A body of so many bytes is parsed in three milliseconds at most. Larger ones are parsed one
# after the other: each holds the interpreter, and the event loop would wait for all of them.
_SMALL_BODY = 16 * 1024
_parser = ThreadPoolExecutor(1, "qwen3-reranker-parse")
_RERANK_PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
_PATHS = (*_RERANK_PATHS, "/score", "/v1/models", OPEN_PATH, "/ready", "/metrics", "/openapi.json")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 408, 413, 421, 422, 429, 500, 503)
}
_Result = TypeVar("_Result")
_Body = TypeVar("_Body", RerankRequest, ScoreRequest)


class ClientGoneError(Exception):
    """The client closed its connection before its answer was there."""


class Service:
    """What the routes do, on one reranker.

    Attributes:
        name: The model's name, as clients see it: no path of this machine.
        is_ready: True once the weights are loaded.
        metrics: Figures of the forwards.
    """

    def __init__(self, reranker: Reranker, name: str, limits: ServerLimits) -> None:
        self._reranker = reranker
        self._limits = limits
        # Not Path's own, as in `checkpoint/locate.py`.
        path = os.path.expanduser(name)
        self.name = Path(path).resolve().name if os.path.exists(path) else name
        self.is_ready = False
        self.metrics = Metrics()

    def load(self) -> None:
        """Load the weights.

        Raises:
            ModelLoadError: If they cannot be loaded.
        """
        self._reranker.observe(self.metrics.record_forward)
        self.is_ready = True

    async def rerank(self, body: RerankRequest) -> RerankAnswer | list[TeiResult]:
        """Rank documents and answer in the dialect they came in."""
        documents = body.documents if body.texts is None else body.texts
        if documents is None:
            raise InputError("documents are missing. Send a list of texts as 'documents'.")
        check_count(len(documents), self._limits)
        # The same weights, a usage of its own.
        twin = self._reranker.limited_to(body.max_tokens_per_doc)
        ranking = await twin.arank(
            body.query, documents, instruction=body.instruction, top_n=body.top_n
        )
        if body.texts is not None:
            return tei_answer(body, documents, ranking)
        return jina_answer(
            body, documents, ranking, model=self.name, prompt_tokens=twin.usage.prompt_tokens
        )

    async def score(self, body: ScoreRequest) -> ScoreAnswer:
        """Score one query with each document, or pairs."""
        queries = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        documents = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        check_count(max(len(queries), len(documents)), self._limits)
        twin = copy.copy(self._reranker)
        if len(queries) == 1:
            scores = await twin.ascore(queries[0], documents, instruction=body.instruction)
        elif len(queries) == len(documents):
            pairs = list(zip(queries, documents, strict=True))
            scores = await twin.ascore_pairs(pairs, instruction=body.instruction)
        else:
            raise InputError(
                f"text_1 and text_2 must be aligned, got {len(queries)} and {len(documents)}. "
                "Send one text_1 for all, or one for each text_2."
            )
        return score_answer(scores, model=self.name, prompt_tokens=twin.usage.prompt_tokens)


def create_app(
    service: Service,
    *,
    api_key: str | None,
    limits: ServerLimits,
    allowed_hosts: Sequence[str] | None = None,
) -> FastAPI:
    """Return the application; the caller loads the service's weights.

    Args:
        service: What the routes do.
        api_key: Key of the clients; None asks for none.
        limits: What requests may ask.
        allowed_hosts: Names, beside those of loopback, by which requests may call the server; None
            allows any.
    """
    app = FastAPI(title="qwen3-reranker", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key, limits=limits, metrics=service.metrics)
    if allowed_hosts is not None:
        app.add_middleware(AllowedHosts, names=allowed_hosts, refuse=_refuse_host)
    # The last is the outermost: it sees what the others refuse.
    app.add_middleware(RequestLog, known_paths=_PATHS, metrics=service.metrics)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RefusedError, _on_refused)

    async def rerank(request: Request) -> Any:
        body = await _body(RerankRequest, request, limits)
        return await _answer(request, service.rerank(body), is_tei=body.texts is not None)

    for path in _RERANK_PATHS:
        app.post(
            path,
            response_model=RerankAnswer | list[TeiResult],
            response_model_exclude_none=True,
            responses=_ERRORS,
            operation_id=path.strip("/").replace("/", "_"),
            openapi_extra=_describe(RerankRequest),
        )(rerank)

    @app.post(
        "/score",
        response_model=ScoreAnswer,
        responses=_ERRORS,
        openapi_extra=_describe(ScoreRequest),
    )
    async def score(request: Request) -> Any:
        body = await _body(ScoreRequest, request, limits)
        return await _answer(request, service.score(body))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "owned_by": "qwen3-reranker"}
        return {"object": "list", "data": [model]}

    @app.get(OPEN_PATH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": ErrorAnswer}})
    async def ready() -> dict[str, str]:
        if not service.is_ready:
            raise HTTPException(503, "the weights are being loaded. Try again later.")
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


def _describe(kind: type[_Body]) -> dict[str, Any]:
    """Return the OpenAPI description of a body, which the routes read themselves."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"content": content, "required": True}}


async def _body(kind: type[_Body], request: Request, limits: ServerLimits) -> _Body:
    """Return the request's body; FastAPI would parse it on the event loop, whatever its size.

    Raises:
        RefusedError: If it is not what it should be.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of a foreign site may send any other type without asking the server before.
    is_json = media_type.startswith("application/") and media_type.endswith(("/json", "+json"))
    if not is_json:
        raise RefusedError(
            422, "the body is not JSON. Send the header Content-Type: application/json."
        )
    content = await request.body()
    if len(content) <= _SMALL_BODY:
        return parse_body(kind, content, limits)
    return await asyncio.get_running_loop().run_in_executor(
        _parser, parse_body, kind, content, limits
    )


async def _answer(
    request: Request, work: Coroutine[Any, Any, _Result], *, is_tei: bool = False
) -> _Result | Response:
    """Return what the work returns, or its error in the client's words."""
    try:
        return await _while_connected(request, work)
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)
    except RefusedError as error:
        return _error(error.status, str(error), is_tei=is_tei)
    except Qwen3RerankerError as error:
        return _error(status_of(error), str(error), is_tei=is_tei)
    except Exception as error:
        # Its name alone: the message of an error that is not ours may hold a text.
        logger.error("A request failed with %s.", type(error).__name__)
        message = f"the server failed with {type(error).__name__}. Its operator can report this."
        return _error(500, message, is_tei=is_tei)


async def _while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await the work, and drop it when the client goes away."""
    working = asyncio.ensure_future(work)
    # The body has been read, so the next message is the end of the connection.
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _error(status: int, message: str, *, is_tei: bool = False) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse(error_answer(status, message, is_tei=is_tei), status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)  # noqa: S101
    messages = {
        404: f"there is no such path. Reranking is at {_RERANK_PATHS[1]}.",
        405: "the path does not take this method. Reranking takes POST.",
        400: "the body cannot be read. Send JSON in UTF-8.",
    }
    reply = _error(error.status_code, messages.get(error.status_code, str(error.detail)))
    reply.headers.update(error.headers or {})  # which methods a path takes
    return reply


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)  # noqa: S101
    return _error(error.status, str(error))


def _refuse_host(message: str) -> Response:
    return _error(421, message)


def serve(
    reranker: Reranker,
    name: str,
    *,
    host: str,
    port: int,
    api_key_file: str | None,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve until a signal comes; requests begun are finished.

    Args:
        reranker: Loaded while the server starts; closed at its end.
        name: The model's name.
        host: Address to listen at; a key is needed for any but loopback.
        port: Port to listen at; 0 takes a free one, which the log names.
        api_key_file: File with the key; None takes the environment's, if there is one.
        allowed_hosts: Names by which requests may call the server, beside its address and those of
            loopback. A server that other machines reach answers to any name if there are none.

    Raises:
        InputError: If other machines could reach a server without a key.
        ModelLoadError: If the weights cannot be loaded.
    """
    api_key = read_api_key(api_key_file)
    if api_key is None and not is_loopback(host):
        raise InputError(
            f"host {host} can be reached by other machines, and there is no API key. Set "
            f"{arguments.API_KEY_VARIABLE}, pass --api-key-file, or use --host 127.0.0.1."
        )
    check_address(host, port)
    keep_little()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    for each in ("qwen3_reranker", "uvicorn"):
        logging.getLogger(each).setLevel(logging.INFO)
    limits = ServerLimits()
    service = Service(reranker, name, limits)
    names = [host, *allowed_hosts] if allowed_hosts or is_loopback(host) else None
    app = create_app(service, api_key=api_key, limits=limits, allowed_hosts=names)
    config = server_config(app, host=host, port=port, shutdown_s=_SHUTDOWN_S)
    with reranker:
        asyncio.run(_run(uvicorn.Server(config), service))


async def _run(server: uvicorn.Server, service: Service) -> None:
    """Load while the server already answers `/health`; end it if that fails."""
    serving = asyncio.create_task(server.serve())
    try:
        await asyncio.to_thread(service.load)
    except BaseException:
        server.should_exit = True
        await serving
        raise
    logger.info("The weights of %s are loaded.", service.name)
    await serving


def read_api_key(file: str | None) -> str | None:
    """Return the key of a file, or of the environment, or None.

    Raises:
        InputError: If the file cannot be read, or what it holds cannot be a key.
    """
    if file is None:
        variable = arguments.API_KEY_VARIABLE
        return arguments.check_api_key(variable, os.environ.get(variable))
    try:
        key = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the file of --api-key-file cannot be read ({type(error).__name__}). Pass a text file "
            "with the key."
        ) from error
    return arguments.check_api_key("the key in the file of --api-key-file", key)

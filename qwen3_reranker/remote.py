"""The verbs of `Reranker` on a rerank server: ours, vLLM, llama.cpp, TEI, Jina- and Cohere-like.

Decides how a call becomes requests and what happens when one fails. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from . import inputs
from .dialects import Endpoint, PromptMode, RemoteScore
from .errors import ClosedError, InputError, Qwen3RerankerError, TimedOutError
from .jobs import Job, Scored
from .results import RankedDocument
from .transport import Connection, is_address
from .verbs import BaseReranker

logger = logging.getLogger(__name__)

OnError = Literal["raise", "keep_order"]
_Prompt: TypeAlias = tuple[str | None, str]
"""Instruction and query."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A request of a call: some distinct documents of one prompt."""

    prompt: _Prompt
    documents: list[str]
    future: Future[list[RemoteScore]]
    gone: threading.Event


class RemoteReranker(BaseReranker):
    """Scores documents on a server, with the verbs and results of `Reranker`.

    The first call asks the server which shape it speaks, whether it applies the prompt template
    and whether it reads instructions; one that applies none is refused, because its scores would
    mean nothing. Objects of equal settings share their connections. Log-odds are the server's
    where it sends them (ours does), else those of its score; `truncated` is False where a server
    does not say. Only our server keeps text from spelling control tokens.

    Args:
        url: Address of a server, or of its rerank path.
        api_key: Sent as bearer token; None takes `QWEN3_RERANKER_API_KEY`. Not part of pickles.
        model: Name sent to servers that want one.
        instruction: Task sentence for every call that gives none; None leaves it to the server.
        prompt_mode: "server" leaves the prompt to the server. "client" sends whole prompts, for a
            server that joins query and document bare, as vLLM does without a template.
        max_tokens_per_doc: Asks a server that can to cut documents; vLLM refuses what is too long.
        timeout_s: Seconds for a call, over all its requests and tries; None for no limit.
        max_documents_per_request: Larger calls are split; TEI takes 32.
        max_in_flight: Requests under way at a time.
        on_error: "keep_order" returns the given order, each result with `reranked=False` and no
            score, where a ranking fails for any reason but the caller's arguments.

    Raises:
        InputError: If an argument has the wrong type or value.
        MissingExtraError: If httpx is not installed.

    Example:
        >>> RemoteReranker("http://127.0.0.1:8012")
        RemoteReranker('http://127.0.0.1:8012')
    """

    _endpoints: ClassVar[weakref.WeakValueDictionary[tuple[Any, ...], Endpoint]] = (
        weakref.WeakValueDictionary()
    )
    _endpoints_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        instruction: str | None = None,
        prompt_mode: PromptMode = "server",
        max_tokens_per_doc: int | None = None,
        timeout_s: float | None = 60.0,
        max_documents_per_request: int = 32,
        max_in_flight: int = 8,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(instruction=instruction, timeout_s=timeout_s)
        self._url = _checked_url(url)
        self._api_key = api_key
        self._settings: dict[str, Any] = {
            "model": inputs.name_or_none("model", model),
            "instruction": self._instruction,
            "prompt_mode": inputs.choice("prompt_mode", prompt_mode, ("server", "client")),
            "max_tokens_per_doc": None
            if max_tokens_per_doc is None
            else inputs.positive_int("max_tokens_per_doc", max_tokens_per_doc),
            "timeout_s": self._timeout_s,
            "max_documents_per_request": inputs.positive_int(
                "max_documents_per_request", max_documents_per_request
            ),
            "max_in_flight": inputs.positive_int("max_in_flight", max_in_flight),
            "on_error": inputs.choice("on_error", on_error, ("raise", "keep_order")),
        }
        self._endpoint: Endpoint | None = self._share()
        self._has_warned = False

    def close(self) -> None:
        """Give up the connections unless others share them."""
        self._endpoint = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without the key; a copy takes the environment's."""
        return partial(type(self), self._url, **self._settings), ()

    def _share(self) -> Endpoint:
        """Return the process's endpoint of these settings."""
        api_key = inputs.api_key(
            "api_key", self._api_key or os.environ.get(inputs.API_KEY_VARIABLE)
        )
        names = ("model", "prompt_mode", "max_tokens_per_doc")
        asked = {name: self._settings[name] for name in names}
        max_in_flight = self._settings["max_in_flight"]
        key = (self._url, api_key, max_in_flight, *asked.values())
        with self._endpoints_lock:
            endpoint = self._endpoints.get(key)
            if endpoint is None:
                endpoint = Endpoint(Connection(api_key, max_in_flight), url=self._url, **asked)
                self._endpoints[key] = endpoint
            return endpoint

    def _refuse_if_closed(self) -> None:
        self._open_endpoint()

    def _open_endpoint(self) -> Endpoint:
        if self._endpoint is None:
            raise ClosedError("this reranker is closed. Make a new one.")
        return self._endpoint

    def _score(self, job: Job) -> Scored:
        parts = self._submit(job)
        try:
            futures = [part.future for part in parts]
            done, _ = wait(futures, job.seconds_left(), return_when=FIRST_EXCEPTION)
            return _join(job, parts, done)
        finally:
            _give_up(parts)

    async def _ascore(self, job: Job) -> Scored:
        parts = self._submit(job)
        waiting = [asyncio.wrap_future(part.future) for part in parts]
        try:
            if waiting:
                await asyncio.wait(
                    waiting, timeout=job.seconds_left(), return_when=asyncio.FIRST_EXCEPTION
                )
            return _join(job, parts, {part.future for part in parts if part.future.done()})
        finally:
            _give_up(parts)
            for future in waiting:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # seen, or asyncio would complain that nobody looked

    def _submit(self, job: Job) -> list[_Part]:
        """Send each prompt's distinct documents, as many to a request as may be."""
        endpoint = self._open_endpoint()
        size = self._settings["max_documents_per_request"]
        deadline = float("inf") if job.deadline is None else job.deadline
        wanted: dict[_Prompt, dict[str, None]] = {}
        for prompt, documents in zip(_prompts(job), job.documents, strict=True):
            wanted.setdefault(prompt, {}).update(dict.fromkeys(documents))
        parts, gone = [], threading.Event()
        for prompt, distinct in wanted.items():
            documents = list(distinct)
            for start in range(0, len(documents), size):
                chunk = documents[start : start + size]
                future = endpoint.connection.submit(endpoint.score, *prompt, chunk, deadline, gone)
                parts.append(_Part(prompt, chunk, future, gone))
        return parts

    def _unranked(self, job: Job, error: Qwen3RerankerError) -> list[list[RankedDocument]] | None:
        """Return the documents as they came, if that is wanted and nobody's mistake."""
        if self._settings["on_error"] == "raise" or isinstance(error, (InputError, ClosedError)):
            return None
        if not self._has_warned:
            self._has_warned = True
            logger.warning("Documents are not reranked: %s", error)
        nan = float("nan")
        return [
            [
                RankedDocument(i, document, nan, nan, False, reranked=False)
                for i, document in enumerate(row)
            ]
            for row in job.documents
        ]


def _give_up(parts: Sequence[_Part]) -> None:
    """Send what is queued no more, and try nothing under way again."""
    for part in parts:
        part.gone.set()
        part.future.cancel()


def _prompts(job: Job) -> list[_Prompt]:
    return list(zip(job.instructions, job.queries, strict=True))


def _join(job: Job, parts: Sequence[_Part], done: set[Future[list[RemoteScore]]]) -> Scored:
    """Align what came back with the job; the first failure is the call's, nothing is left out."""
    for part in parts:
        if part.future in done and part.future.exception() is not None:
            part.future.result()
    if len(done) < len(parts):
        raise TimedOutError(
            f"the server did not score {job.num_documents} documents within timeout_s "
            f"({len(done)} of {len(parts)} requests were answered). Allow more time, or send fewer."
        )
    known: dict[tuple[_Prompt, str], RemoteScore] = {}
    for part in parts:
        for document, score in zip(part.documents, part.future.result(), strict=True):
            known[part.prompt, document] = score
    rows = [
        [known[prompt, document] for document in documents]
        for prompt, documents in zip(_prompts(job), job.documents, strict=True)
    ]
    return Scored(
        [[score.log_odds for score in row] for row in rows],
        [[score.truncated for score in row] for row in rows],
        [[None] * len(row) for row in rows],
    )


def _checked_url(url: Any) -> str:
    """Return an address that can be shown in logs.

    Raises:
        InputError: If it is no http address, or holds a password.
    """
    if not isinstance(url, str):
        raise InputError(
            f"url must be a string, got {type(url).__name__}. Pass an address such as "
            "'http://127.0.0.1:8012'."
        )
    text = url.strip()
    try:
        parts = urlsplit(text)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port past 65,535
        is_http = False
    if not is_http or not is_address(text):
        raise InputError(
            "url must be an http or https address with a host. Pass one such as "
            "'http://127.0.0.1:8012'."
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            "url must have no user, password, query or fragment: it stands in logs. Pass the key "
            "as api_key."
        )
    return text

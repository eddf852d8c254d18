"""The verbs of `Reranker` on a rerank server: ours, vLLM, llama.cpp, TEI, Jina- and Cohere-like.

Decides how a call becomes requests and what happens when one fails. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from ..call import arguments
from ..call.futures import LockFreeFuture
from ..call.job import Job, Scored
from ..call.results import RankedDocument
from ..call.verbs import BaseReranker
from ..call.waiting import await_until, wait_until
from ..errors import ClosedError, InputError, Qwen3RerankerError
from .http import HttpClient, RequestLoop, is_address
from .servers import Endpoint, PromptMode, RemoteScore

logger = logging.getLogger(__name__)

OnError = Literal["raise", "keep_order"]
_Prompt: TypeAlias = tuple[str | None, str]
"""Instruction and query."""


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
            "model": arguments.check_name("model", model),
            "instruction": self._instruction,
            "prompt_mode": arguments.check_choice("prompt_mode", prompt_mode, ("server", "client")),
            "max_tokens_per_doc": None
            if max_tokens_per_doc is None
            else arguments.check_positive_int("max_tokens_per_doc", max_tokens_per_doc),
            "timeout_s": self._timeout_s,
            "max_documents_per_request": arguments.check_positive_int(
                "max_documents_per_request", max_documents_per_request
            ),
            "max_in_flight": arguments.check_positive_int("max_in_flight", max_in_flight),
            "on_error": arguments.check_choice("on_error", on_error, ("raise", "keep_order")),
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
        api_key = arguments.check_api_key(
            "api_key", self._api_key or os.environ.get(arguments.API_KEY_VARIABLE)
        )
        names = ("model", "prompt_mode", "max_tokens_per_doc")
        asked = {name: self._settings[name] for name in names}
        max_in_flight = self._settings["max_in_flight"]
        key = (self._url, api_key, max_in_flight, *asked.values())
        with self._endpoints_lock:
            endpoint = self._endpoints.get(key)
            if endpoint is None:
                endpoint = Endpoint(HttpClient(api_key, max_in_flight), url=self._url, **asked)
                self._endpoints[key] = endpoint
            return endpoint

    def _refuse_if_closed(self) -> None:
        self._open_endpoint()

    def _open_endpoint(self) -> Endpoint:
        if self._endpoint is None:
            raise ClosedError("this reranker is closed. Make a new one.")
        return self._endpoint

    def _score(self, job: Job) -> Scored:
        return wait_until(job, partial(self._submit, job))

    async def _ascore(self, job: Job) -> Scored:
        return await await_until(job, partial(self._submit, job))

    def _submit(
        self, job: Job, on_done: Callable[[], object] | None = None
    ) -> LockFreeFuture[Scored]:
        endpoint = self._open_endpoint()
        work = partial(_score_job, endpoint, job, self._settings["max_documents_per_request"])
        return endpoint.client.submit(work, job.deadline, on_done)

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


if hasattr(os, "register_at_fork"):
    # Another thread may have held it at the fork, and does not exist in the child.
    os.register_at_fork(
        after_in_child=lambda: setattr(RemoteReranker, "_endpoints_lock", threading.Lock())
    )


async def _score_job(endpoint: Endpoint, job: Job, size: int, loop: RequestLoop) -> Scored:
    """Score each prompt's distinct documents and align what came back with the job.

    A call has no more requests waiting than may be under way, so that a small one that comes while
    a large one runs takes its turn between those. The first failure is the call's.
    """
    parts = list(_parts(job, size))
    left = iter(parts)
    known: dict[tuple[_Prompt, str], RemoteScore] = {}

    async def work() -> None:
        for prompt, documents in left:
            scores = await endpoint.score(loop, *prompt, documents, job.deadline)
            known.update(zip([(prompt, text) for text in documents], scores, strict=True))

    workers = [asyncio.create_task(work()) for _ in parts[: loop.max_in_flight]]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    rows = [
        [known[prompt, document] for document in documents]
        for prompt, documents in zip(_prompts(job), job.documents, strict=True)
    ]
    return Scored(
        [[score.log_odds for score in row] for row in rows],
        [[score.truncated for score in row] for row in rows],
        [[None] * len(row) for row in rows],
    )


def _parts(job: Job, size: int) -> Iterator[tuple[_Prompt, list[str]]]:
    """Yield a call's requests: some distinct documents of one prompt."""
    wanted: dict[_Prompt, dict[str, None]] = {}
    for prompt, documents in zip(_prompts(job), job.documents, strict=True):
        wanted.setdefault(prompt, {}).update(dict.fromkeys(documents))
    for prompt, distinct in wanted.items():
        documents = list(distinct)
        for start in range(0, len(documents), size):
            yield prompt, documents[start : start + size]


def _prompts(job: Job) -> list[_Prompt]:
    return list(zip(job.instructions, job.queries, strict=True))


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

"""What a foreign rerank server understands, found out by asking it once; bodies and replies.

Decides the path and the shape (Jina, Cohere and vLLM; or TEI), whether the server applies a prompt
template, and which replies are rankings. Knows nothing of sockets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from ..call.results import probability
from ..errors import InputError, RemoteError, RemoteProtocolError
from ..text.prompt import QWEN3_RERANKER
from ..text.strings import repaired
from .http import HttpClient, RequestLoop

logger = logging.getLogger(__name__)

PromptMode = Literal["server", "client"]

_PROBE_QUERY, _PROBE_DOCUMENT = "a", "b"
# Tokens of the probe's query and document are two, and a few more that join them. The template
# around them has more than 60, and an instruction that is read has one for each of its words.
_FEWEST_OF_A_TEMPLATE = 16
_PROBE_WORDS, _FEW_WORDS = 256, 64
_MOST_TOKENS = 10**9  # of any prompt; more is no count
_LEAST = 1e-300  # log-odds of it are finite, and so is their exponential
_NOT_UNDERSTOOD = frozenset({400, 422})
_NOT_HERE = _NOT_UNDERSTOOD | {404, 405}
"""Statuses of a server that has no such path, or does not understand the shape."""
_Way: TypeAlias = tuple[str, str]
"""Where requests go and what the documents are called there."""
_Post: TypeAlias = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Posts a body to a URL and returns the reply."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one server understands.

    Attributes:
        url: Where requests go.
        field: Name of the documents: "documents", or "texts" for TEI.
        reads_instruction: True if it puts a request's instruction into the prompt.
    """

    url: str
    field: str
    reads_instruction: bool


@dataclass(frozen=True, slots=True)
class RemoteScore:
    """What a server said of a document."""

    log_odds: float
    truncated: bool


class Endpoint:
    """A server, asked what it understands by the first request.

    Args:
        client: How it is reached.
        url: Its address, or that of its rerank path.
        model: Name sent with requests; None sends none.
        prompt_mode: Who puts the texts into the prompt.
        max_tokens_per_doc: Sent with requests; None sends none.
    """

    def __init__(
        self,
        client: HttpClient,
        *,
        url: str,
        model: str | None,
        prompt_mode: PromptMode,
        max_tokens_per_doc: int | None,
    ) -> None:
        self.client = client
        self._url = url.rstrip("/")
        self._model = model
        self._prompt_mode = prompt_mode
        self._max_tokens_per_doc = max_tokens_per_doc
        self._dialect: Dialect | None = None

    async def score(
        self,
        loop: RequestLoop,
        instruction: str | None,
        query: str,
        documents: Sequence[str],
        deadline: float | None,
    ) -> list[RemoteScore]:
        """Score documents with one request, when a place is free.

        Args:
            loop: Makes the request.
            instruction: Task sentence; None leaves it to the server.
            query: The query.
            documents: The documents.
            deadline: When the call is given up, on the monotonic clock; None for never.

        Raises:
            InputError: If the server does not read the instruction.
            Qwen3RerankerError: As `RequestLoop.post`.
            RemoteProtocolError: If the reply is not one score for each document.
        """
        async with loop.places:
            dialect = await self._ask(loop, deadline)
            if instruction is not None and self._prompt_mode == "server":
                _check_instruction_is_read(dialect)
            body = self._body(dialect.field, instruction, query, documents)
            if self._max_tokens_per_doc is not None:
                body["max_tokens_per_doc"] = self._max_tokens_per_doc
            answer = await loop.post(dialect.url, body, deadline)
        return read_scores(answer, len(documents))

    async def _ask(self, loop: RequestLoop, deadline: float | None) -> Dialect:
        """Return what the server understands; concurrent first calls ask once."""
        if self._dialect is None:
            async with loop.first:
                if self._dialect is None:
                    self._dialect = await self._probe(partial(loop.post, deadline=deadline))
        return self._dialect

    async def _probe(self, post: _Post) -> Dialect:
        ways = [(f"{self._url}/v1/rerank", "documents")]
        if self._url.endswith("/rerank"):
            ways = [(self._url, "documents"), (self._url, "texts")]
        else:
            ways += [(f"{self._url}/rerank", "documents"), (f"{self._url}/rerank", "texts")]
        if self._prompt_mode == "client":
            way, tokens = await self._first_answer(post, ways, 0)
            self._check_template(tokens)
            return Dialect(*way, reads_instruction=False)
        try:
            way, tokens = await self._first_answer(post, ways, _PROBE_WORDS)
            reads_instruction = tokens is not None and tokens >= _PROBE_WORDS
        except RemoteError as error:
            if error.status not in _NOT_UNDERSTOOD:
                raise
            # It may read short prompts only.
            way, tokens = await self._first_answer(post, ways, 0)
            reads_instruction = await self._reads_more(post, way, tokens)
        self._check_template(tokens)
        return Dialect(*way, reads_instruction)

    async def _first_answer(
        self, post: _Post, ways: Sequence[_Way], num_words: int
    ) -> tuple[_Way, int | None]:
        """Ask one way after the other, with an instruction of so many words or none.

        Returns:
            The first way that is understood, and the tokens that were read.

        Raises:
            RemoteError: If none is understood: of refusals the one that tells most.
        """
        question = self._model_field() | {"query": _PROBE_QUERY}
        if num_words:
            question["instruction"] = " ".join(["x"] * num_words)
        refusals: list[RemoteError] = []
        for url, field in ways:
            try:
                answer = await post(url, question | {field: [_PROBE_DOCUMENT]})
            except RemoteError as error:
                if error.status not in _NOT_HERE:
                    raise
                refusals.append(error)
                continue
            read_scores(answer, 1)
            return (url, field), _prompt_tokens(answer)
        raise min(refusals, key=lambda refusal: refusal.status not in _NOT_UNDERSTOOD)

    async def _reads_more(self, post: _Post, way: _Way, tokens: int | None) -> bool:
        """Say whether a short instruction, in the default one's place, makes a prompt longer."""
        try:
            _, more = await self._first_answer(post, [way], _FEW_WORDS)
        except RemoteError as error:
            if error.status not in _NOT_UNDERSTOOD:
                raise
            return False
        return tokens is not None and more is not None and more - tokens >= _FEW_WORDS // 2

    def _check_template(self, tokens: int | None) -> None:
        if tokens is None:
            logger.info("The server reports no tokens; who applies the prompt cannot be checked.")
            return
        is_applied = tokens >= _FEWEST_OF_A_TEMPLATE
        if self._prompt_mode == "server" and not is_applied:
            raise RemoteProtocolError(
                f"the server applies no prompt template: it read {tokens} tokens where a prompt of "
                "Qwen3-Reranker has more than 60, so its scores would mean nothing. Start it with "
                "the template, or use prompt_mode='client'."
            )
        if self._prompt_mode == "client" and is_applied:
            raise RemoteProtocolError(
                f"the server applies a prompt template of its own ({tokens} tokens for two "
                "letters), and prompt_mode='client' would put one prompt into another. Use "
                "prompt_mode='server'."
            )

    def _body(
        self, field: str, instruction: str | None, query: str, documents: Sequence[str]
    ) -> dict[str, Any]:
        body = self._model_field()
        if self._prompt_mode == "client":
            template = QWEN3_RERANKER
            if instruction is None:
                instruction = template.default_instruction
            query = (
                template.prefix + template.instruction_label + instruction
                + template.query_label + query + "\n"
            )  # fmt: skip
            label = template.document_label.removeprefix("\n") + " "
            documents = [label + document + template.suffix for document in documents]
        elif instruction is not None:
            body["instruction"] = repaired(instruction)
        body["query"] = repaired(query)
        body[field] = [repaired(document) for document in documents]
        return body

    def _model_field(self) -> dict[str, Any]:
        return {} if self._model is None else {"model": self._model}


def _check_instruction_is_read(dialect: Dialect) -> None:
    if not dialect.reads_instruction:
        raise InputError(
            "the server does not read instructions (llama.cpp has one fixed in its file, TEI has "
            "none). Leave instruction out, or use a server that does, such as ours or vLLM."
        )


def _prompt_tokens(answer: Any) -> int | None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    return tokens if type(tokens) is int and 0 <= tokens <= _MOST_TOKENS else None


def read_scores(answer: Any, count: int) -> list[RemoteScore]:
    """Return one score per document from a reply in any shape.

    Raises:
        RemoteProtocolError: If a document has no score or several, or one that is no probability.

    Example:
        >>> [score.log_odds for score in read_scores([{"index": 0, "score": 0.5}], 1)]
        [0.0]
    """
    rows = answer.get("results") if isinstance(answer, dict) else answer
    if not isinstance(rows, list):
        raise _no_ranking("it has no list of results")
    scores: dict[int, RemoteScore] = {}
    for row in rows:
        index = row.get("index") if isinstance(row, dict) else None
        if type(index) is not int or not 0 <= index < count:
            raise _no_ranking(f"an index is missing or none of the {count} documents'")
        if index in scores:
            raise _no_ranking(f"index {index} stands twice")
        scores[index] = _read_score(row, index)
    if len(scores) != count:
        raise _no_ranking(f"it has {len(scores)} results for {count} documents")
    return [scores[index] for index in range(count)]


def _read_score(row: dict[str, Any], index: int) -> RemoteScore:
    score = row.get("relevance_score", row.get("score"))
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if score is None or not is_number or not 0 <= score <= 1:  # also NaN
        raise _no_ranking(f"the score of index {index} is no number between 0 and 1")
    log_odds: Any = row.get("log_odds")  # ours sends them: they do not saturate
    is_usable = (
        isinstance(log_odds, float)
        and math.isfinite(log_odds)
        and math.isclose(probability(log_odds), score, rel_tol=1e-9)  # a calibrated score's differ
    )
    return RemoteScore(log_odds if is_usable else _log_odds(score), row.get("truncated") is True)


def _log_odds(score: float) -> float:
    """Return log-odds of a probability; finite, so that 0 and 1 can be sorted with the rest."""
    return math.log(max(score, _LEAST)) - math.log1p(-min(score, 1 - math.ulp(0.5)))


def _no_ranking(fault: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"the server's reply is no ranking: {fault}. Nothing of it is used. Check that the URL is "
        "a rerank server's."
    )

"""What travels between rerank clients and the server: bodies, answers, errors, limits.

Decides which dialects are understood (Jina, Cohere v1 and v2, vLLM; TEI where `texts` is sent) and
how each is answered. Knows nothing of models or of HTTP beyond status codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from ..call.results import RankedDocument
from ..errors import (
    ClosedError,
    DocumentTooLargeError,
    InputError,
    ModelLoadError,
    OverloadedError,
    TimedOutError,
)
from ..text.strings import repaired


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one request, and all that wait together, may ask.

    Attributes:
        body_bytes: Bytes of a request's body.
        documents: Documents of a request.
        waiting: Requests that wait or are scored; one more is refused.
        values: Values of all kinds in a body, and keys, so that none is costly to parse.
        depth: Lists and objects of a body inside each other.
        body_s: Seconds in which a body must have come.
        arriving_bytes: Bytes of all bodies on their way; past it the oldest is refused.
    """

    body_bytes: int = 8 * 1024 * 1024
    documents: int = 1000
    waiting: int = 256
    values: int = 100_000
    depth: int = 100
    body_s: float = 30.0
    arriving_bytes: int = 256 * 1024 * 1024


class RefusedError(Exception):
    """A request that is not answered, for what it is and not for what it asks.

    Args:
        status: Status of the answer.
        message: What is wrong, without anything that the request holds.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _text(value: Any) -> Any:
    # Browsers cut emoji in two, and pydantic refuses half a character.
    return repaired(value) if isinstance(value, str) else value


def _text_of(value: Any) -> Any:
    """Return the text of a document, which Cohere's and Jina's clients may wrap."""
    return _text(value.get("text") if isinstance(value, Mapping) else value)


Text = Annotated[str, BeforeValidator(_text)]
DocumentText = Annotated[
    str, BeforeValidator(_text_of, json_schema_input_type=str | dict[str, Any])
]


Count = Annotated[int, Field(ge=1)]


class RerankRequest(BaseModel):
    """A query and its documents. Fields of other servers are ignored; null means not given."""

    query: Text
    documents: list[DocumentText] | None = None
    texts: list[DocumentText] | None = Field(None, description="Documents, for an answer as TEI's.")
    model: str | None = Field(None, description="Any name: one model is served.")
    instruction: Text | None = Field(None, description="Task sentence.")
    top_n: Count | None = Field(None, description="Results to keep; null keeps all.")
    return_documents: bool | None = None
    return_text: bool | None = Field(None, description="TEI's name of return_documents.")
    raw_scores: bool | None = Field(None, description="TEI: log-odds in place of probabilities.")
    max_tokens_per_doc: Count | None = None


class ScoreRequest(BaseModel):
    """One query with each text, or texts pair by pair, as vLLM's `/score`."""

    text_1: Text | list[Text]
    text_2: Text | list[Text]
    model: str | None = None
    instruction: Text | None = None


_Body = TypeVar("_Body", RerankRequest, ScoreRequest)
_LISTS = ("documents", "texts", "text_1", "text_2")
# Strings are passed over whole. Nothing is tried twice, so the time is linear in the text.
_MARK = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},:]', re.DOTALL)


def parse_body(kind: type[_Body], content: bytes, limits: ServerLimits) -> _Body:
    """Return a request from its JSON; sizes are checked before anything is built from it.

    Takes milliseconds for the largest body within the limits: not for an event loop.

    Raises:
        RefusedError: If it is no JSON, or too large, or not of this kind.
    """
    if not content:
        raise _invalid([{"loc": (), "msg": "Field required"}])
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        _check_size(text, limits)
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise _invalid([{"loc": (error.pos,), "msg": "JSON decode error"}]) from None
    except (ValueError, RecursionError):  # no text; a number of 4,300 digits
        raise _unreadable() from None
    if isinstance(body, dict):
        for name in _LISTS:
            if isinstance(body.get(name), list):
                check_count(len(body[name]), limits)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        raise _invalid(faults) from None


def check_count(count: int, limits: ServerLimits) -> None:
    """Check how many documents a request has.

    Raises:
        RefusedError: If they are too many.
    """
    if count > limits.documents:
        raise RefusedError(
            413,
            f"a request may have {limits.documents} documents, got {count}. Send them in several "
            "requests.",
        )


def _check_size(text: str, limits: ServerLimits) -> None:
    """Count values and depth of a JSON text without building any of them."""
    values = depth = 0
    for found in _MARK.finditer(text):
        mark = found[0]
        if mark in "[{":
            depth += 1
            if depth > limits.depth:
                raise _unreadable()
        elif mark in "]}":
            depth -= 1
        # What begins a list or stands behind a separator is a value, or a key of an object.
        values += mark in "[{,:"
        if values > limits.values:
            raise RefusedError(
                413,
                f"the body has more than {limits.values} values. Send a list of at most "
                f"{limits.documents} texts, and leave out other fields.",
            )


def _unreadable() -> RefusedError:
    return RefusedError(400, "the body cannot be read. Send JSON in UTF-8.")


def _invalid(faults: Sequence[Mapping[str, Any]]) -> RefusedError:
    return RefusedError(422, describe_faults(faults))


class DocumentEcho(BaseModel):
    """A document as it was sent."""

    text: str


class RerankResult(BaseModel):
    """A document's place in the ranking; log-odds do not saturate where scores do."""

    index: int
    relevance_score: float
    log_odds: float
    truncated: bool
    document: DocumentEcho | None = None


class TokenUsage(BaseModel):
    """Tokens of all prompts, each counted whole."""

    prompt_tokens: int
    total_tokens: int


class RerankAnswer(BaseModel):
    """Documents, most relevant first."""

    id: str
    object: str = "list"
    model: str
    results: list[RerankResult]
    usage: TokenUsage
    meta: dict[str, Any]


class TeiResult(BaseModel):
    """A document's place in the ranking, in TEI's words."""

    index: int
    score: float
    text: str | None = None


class PairScore(BaseModel):
    """The score of a pair."""

    index: int
    object: str = "score"
    score: float


class ScoreAnswer(BaseModel):
    """Scores, in the order of the pairs."""

    id: str
    object: str = "list"
    model: str
    data: list[PairScore]
    usage: TokenUsage


class ErrorDetail(BaseModel):
    """What went wrong, as vLLM and llama.cpp say it."""

    message: str
    type: str
    code: int


class ErrorAnswer(BaseModel):
    """What went wrong, where clients of each dialect look for it."""

    error: ErrorDetail
    message: str
    detail: str


def jina_answer(
    request: RerankRequest,
    documents: Sequence[str],
    ranking: Sequence[RankedDocument],
    *,
    model: str,
    prompt_tokens: int,
) -> RerankAnswer:
    """Return a ranking as Jina, Cohere and vLLM do."""
    return RerankAnswer(
        id=f"rerank-{uuid4().hex}",
        model=model,
        results=[
            RerankResult(
                index=result.index,
                relevance_score=result.score,
                log_odds=result.log_odds,
                truncated=result.truncated,
                document=DocumentEcho(text=documents[result.index])
                if request.return_documents
                else None,
            )
            for result in ranking
        ],
        usage=TokenUsage(prompt_tokens=prompt_tokens, total_tokens=prompt_tokens),
        meta={
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": prompt_tokens, "output_tokens": 0},
        },
    )


def tei_answer(
    request: RerankRequest, documents: Sequence[str], ranking: Sequence[RankedDocument]
) -> list[TeiResult]:
    """Return a ranking as text-embeddings-inference does."""
    return [
        TeiResult(
            index=result.index,
            score=result.log_odds if request.raw_scores else result.score,
            text=documents[result.index] if request.return_text else None,
        )
        for result in ranking
    ]


def score_answer(scores: Sequence[float], *, model: str, prompt_tokens: int) -> ScoreAnswer:
    """Return scores as vLLM does."""
    return ScoreAnswer(
        id=f"score-{uuid4().hex}",
        model=model,
        data=[PairScore(index=i, score=score) for i, score in enumerate(scores)],
        usage=TokenUsage(prompt_tokens=prompt_tokens, total_tokens=prompt_tokens),
    )


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (InputError, 400),
    (DocumentTooLargeError, 413),
    (OverloadedError, 429),
    (ModelLoadError, 503),
    (ClosedError, 503),
    (TimedOutError, 504),
)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "method_not_allowed",
    408: "timeout_error",
    413: "request_too_large",
    421: "misdirected_request",
    422: "invalid_request_error",
    429: "overloaded_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_TEI_TYPES = {
    400: "Validation",
    413: "Validation",
    422: "Validation",
    429: "Overloaded",
    503: "Unhealthy",
}


def status_of(error: Exception) -> int:
    """Return the HTTP status of one of our errors."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def error_answer(status: int, message: str, *, is_tei: bool = False) -> dict[str, Any]:
    """Return an error in the shape that the client of a request expects."""
    if is_tei:
        return {"error": message, "error_type": _TEI_TYPES.get(status, "Backend")}
    detail = ErrorDetail(message=message, type=_TYPES.get(status, "server_error"), code=status)
    return ErrorAnswer(error=detail, message=message, detail=message).model_dump()


def describe_faults(faults: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with a body, without anything that stands in it.

    Example:
        >>> describe_faults([{"loc": ("top_n",), "msg": "Input should be an integer"}])
        'top_n: Input should be an integer. Correct the body; /openapi.json describes it.'
    """
    shown = []
    for fault in faults[:3]:
        place = ".".join(str(part) for part in fault["loc"] if isinstance(part, (str, int)))
        shown.append(f"{place or 'body'}: {fault['msg']}")
    others = f" ({len(faults) - 3} more)" if len(faults) > 3 else ""
    return f"{'; '.join(shown)}{others}. Correct the body; /openapi.json describes it."

"""What travels between rerank clients and the server: bodies, answers, errors, limits.

Decides which dialects are understood (Jina, Cohere v1 and v2, vLLM; TEI where `texts` is sent) and
how each is answered. Knows nothing of models or of HTTP beyond status codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import uuid4

from pydantic import BaseModel, BeforeValidator, Field

from .errors import (
    ClosedError,
    DocumentTooLargeError,
    InputError,
    ModelLoadError,
    OverloadedError,
    TimedOutError,
)
from .inputs import repaired
from .results import RankedDocument


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one request, and all that wait together, may ask.

    Attributes:
        body_bytes: Bytes of a request's body.
        documents: Documents of a request.
        waiting: Requests that wait or are scored; one more is refused.
    """

    body_bytes: int = 8 * 1024 * 1024
    documents: int = 1000
    waiting: int = 256


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
    413: "request_too_large",
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
        >>> describe_faults([{"loc": ("body", "top_n"), "msg": "Input should be an integer"}])
        'top_n: Input should be an integer. Correct the body; /openapi.json describes it.'
    """
    shown = []
    for fault in faults[:3]:
        place = ".".join(str(part) for part in fault["loc"][1:] if isinstance(part, (str, int)))
        shown.append(f"{place or 'body'}: {fault['msg']}")
    others = f" ({len(faults) - 3} more)" if len(faults) > 3 else ""
    return f"{'; '.join(shown)}{others}. Correct the body; /openapi.json describes it."

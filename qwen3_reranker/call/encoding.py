"""How a call's texts become token ids, and scores of ids become scores of its documents.

Decides what is encoded: documents cut, whole or in windows. Knows nothing of threads or models.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..errors import InputError
from ..text.steps import Steps, finish
from ..text.tokenizer import EncodedGroup, PromptTokenizer
from ..text.windows import Piece, WindowScore, fold, window_steps
from .job import Job, Scored


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a document may be, and what becomes of a longer one.

    Attributes:
        max_length: Tokens per pair, prompt included.
        window_score: How the scores of a long document's windows become one; None cuts its end.
        max_windows: Windows of one document; None for all.
        max_document_tokens: Tokens of a document; the rest is not read. None for all.
    """

    max_length: int
    window_score: WindowScore | None = None
    max_windows: int | None = None
    max_document_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class EncodedJob:
    """Ids of a call.

    Attributes:
        groups: One per query.
        pieces: Per query and document its windows in characters, None for a document read whole.
        truncated: Per query and document, True if a part of it is not read.
    """

    groups: list[EncodedGroup]
    pieces: list[list[list[Piece] | None]]
    truncated: list[list[bool]]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, as if each were read alone."""
        return sum(
            len(group.head) + len(document) for group in self.groups for document in group.documents
        )

    def name(self, job: Job, query: int, place: int) -> str:
        """Return how the caller knows a document, given its or its window's place in a group."""
        counts = [1 if windows is None else len(windows) for windows in self.pieces[query]]
        return job.name_document(query, bisect_right(list(accumulate(counts)), place))


def encode_job(job: Job, tokenizer: PromptTokenizer, limits: Limits) -> EncodedJob:
    """Encode all queries of a call with their documents.

    Raises:
        InputError: If instruction and query leave no room for a document; it names the query.
    """
    return finish(encode_steps(job, tokenizer, limits))


def encode_steps(job: Job, tokenizer: PromptTokenizer, limits: Limits) -> Steps[EncodedJob]:
    """Do what `encode_job` does, some documents to a step.

    Raises:
        InputError: As `encode_job`.
    """
    encoded = EncodedJob([], [], [])
    for i, query in enumerate(job.queries):
        try:
            group, pieces, truncated = yield from _group_steps(
                tokenizer, limits, job.instructions[i], query, job.documents[i]
            )
        except InputError as error:
            if len(job.queries) == 1 and job.rows is None:
                raise
            raise InputError(f"{job.name_query(i)}: {error}") from error
        encoded.groups.append(group)
        encoded.pieces.append(pieces)
        encoded.truncated.append(truncated)
    return encoded


def _group_steps(
    tokenizer: PromptTokenizer,
    limits: Limits,
    instruction: str | None,
    query: str,
    documents: Sequence[str],
) -> Steps[tuple[EncodedGroup, list[list[Piece] | None], list[bool]]]:
    """Encode a query with its documents, cut, whole or in windows as the limits say."""
    texts = documents
    if limits.max_document_tokens is not None:
        texts = []
        for document in documents:
            texts.append((yield from tokenizer.cut_steps(document, limits.max_document_tokens)))
    if limits.window_score is None:
        group = yield from tokenizer.group_steps(
            instruction, query, texts, max_length=limits.max_length
        )
        pieces: list[list[Piece] | None] = [None] * len(texts)
        truncated = group.truncated
    else:
        group, pieces, truncated = yield from window_steps(
            tokenizer,
            instruction,
            query,
            texts,
            max_length=limits.max_length,
            max_windows=limits.max_windows,
        )
    if texts is not documents:
        truncated = [
            is_cut or text is not document
            for is_cut, text, document in zip(truncated, texts, documents, strict=True)
        ]
    return group, pieces, truncated


def align(
    encoded: EncodedJob, log_odds: Sequence[Sequence[float]], window_score: WindowScore | None
) -> Scored:
    """Return one score per document from the scores of what was encoded."""
    rows = [
        fold(row, pieces, window_score or "max")
        for row, pieces in zip(log_odds, encoded.pieces, strict=True)
    ]
    return Scored([scores for scores, _ in rows], encoded.truncated, [best for _, best in rows])

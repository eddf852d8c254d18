"""A call on its way: from checked texts to ids, and from scores back to its documents.

Decides what is encoded for a call and how its results are aligned with what the caller gave. Knows
nothing of threads or models.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from time import monotonic
from typing import TypeVar

from .calibration import UNCALIBRATED, Calibration
from ..errors import InputError
from .results import RankedDocument, cut_ranking, rank_documents
from ..text.steps import Steps, finish
from ..text.tokenizer import EncodedGroup, PromptTokenizer
from ..text.windows import Piece, WindowScore, fold, window_steps

Key = TypeVar("Key")
Value = TypeVar("Value")


def rows_by(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Return the rows of each key, in the order in which keys come.

    Example:
        >>> rows_by(["tea", "rain", "tea"])
        {'tea': [0, 2], 'rain': [1]}
    """
    rows: dict[Key, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return rows


@dataclass(frozen=True, slots=True)
class Job:
    """A checked call: one instruction and one list of documents per query; its repr has no text.

    Attributes:
        queries: The queries.
        documents: Documents of each.
        instructions: Task sentence of each; None is the template's own.
        deadline: When the call gives up, on the monotonic clock; None for never.
        rows: If the caller gave pairs, for each query the pairs that its documents are of.
    """

    queries: list[str] = field(repr=False)
    documents: list[list[str]] = field(repr=False)
    instructions: list[str | None] = field(repr=False)
    deadline: float | None = None
    rows: list[list[int]] | None = None

    @property
    def num_documents(self) -> int:
        """Documents of all queries."""
        return sum(map(len, self.documents))

    def name_query(self, query: int) -> str:
        """Return how the caller knows one query of several, or that of a pair."""
        if self.rows is not None:
            return f"query of pairs[{self.rows[query][0]}]"
        return f"queries[{query}]"

    def name_document(self, query: int, document: int) -> str:
        """Return how the caller knows a document."""
        if self.rows is not None:
            return f"document of pairs[{self.rows[query][document]}]"
        is_single = len(self.queries) == 1
        return f"documents[{document}]" if is_single else f"documents[{query}][{document}]"

    def in_rows(self, values: Sequence[Sequence[Value]]) -> list[Value]:
        """Return what belongs to each document in the order of the caller's pairs.

        Example:
            >>> Job(["q", "r"], [["a", "c"], ["b"]], [None] * 2, rows=[[0, 2], [1]]).in_rows(
            ...     [[0.1, 0.3], [0.2]]
            ... )
            [0.1, 0.2, 0.3]
        """
        rows = chain.from_iterable(self.rows or [])
        found = dict(zip(rows, chain.from_iterable(values), strict=True))
        return [found[row] for row in range(len(found))]

    def seconds_left(self) -> float | None:
        """Return how long the call may still take, None for as long as it takes."""
        return None if self.deadline is None else max(self.deadline - monotonic(), 0.0)


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


@dataclass(frozen=True, slots=True)
class Scored:
    """Results aligned with a job's documents, and how log-odds become scores."""

    log_odds: list[list[float]]
    truncated: list[list[bool]]
    windows: list[list[Piece | None]]
    calibration: Calibration = UNCALIBRATED

    @classmethod
    def empty(cls, job: Job) -> Scored:
        """Return the results of a job without documents."""
        nothing: list[list[float]] = [[] for _ in job.queries]
        return cls(nothing, [[] for _ in job.queries], [[] for _ in job.queries])

    @property
    def scores(self) -> list[list[float]]:
        """P("yes") of each query's documents."""
        return [[self.calibration.probability(value) for value in row] for row in self.log_odds]

    @property
    def probabilities(self) -> list[float]:
        """P("yes") of all documents in order."""
        return list(chain.from_iterable(self.scores))


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


def rank_all(
    job: Job, scored: Scored, top_n: int | None, score_threshold: float | None
) -> list[list[RankedDocument]]:
    """Return a ranking per query."""
    columns = (job.documents, scored.scores, scored.log_odds, scored.truncated, scored.windows)
    rows = zip(*columns, strict=True)
    return [cut_ranking(rank_documents(*row), top_n, score_threshold) for row in rows]

"""A checked call, and its results aligned with what the caller gave.

Knows nothing of tokens, threads or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from .calibration import UNCALIBRATED, Calibration
from .results import RankedDocument, cut_ranking, rank_documents

if TYPE_CHECKING:
    from ..text.windows import Piece

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


def rank_all(
    job: Job, scored: Scored, top_n: int | None, score_threshold: float | None
) -> list[list[RankedDocument]]:
    """Return a ranking per query."""
    columns = (job.documents, scored.scores, scored.log_odds, scored.truncated, scored.windows)
    rows = zip(*columns, strict=True)
    return [cut_ranking(rank_documents(*row), top_n, score_threshold) for row in rows]

"""What a call returns, and the seam where a scorer can be replaced.

Knows nothing of models: tests and applications may put any object with these verbs in the place
of a `Reranker`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, runtime_checkable

from ..errors import NonFiniteScoreError, RankingError


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document of a ranked list.

    Attributes:
        index: Position in the caller's list.
        document: The caller's own object where that is a plain string, else its characters; left
            out of `repr`, which ends up in logs.
        score: P("yes") between 0 and 1, calibrated if the reranker has a calibration.
        log_odds: logit(yes) - logit(no), the model's own whatever the calibration; does not
            saturate, so it is what the list is sorted by.
        truncated: True if a part of the document was not read, to fit `max_length`.
        window: Start and stop in characters of the best window, if the document was read in
            windows because of its length; the reranker's `window_score` says how.
        reranked: False if a server failed and the list is as it was given; score and log-odds are
            NaN then.
    """

    index: int
    document: str = field(repr=False)
    score: float
    log_odds: float
    truncated: bool
    window: tuple[int, int] | None = None
    reranked: bool = True


@dataclass(frozen=True, slots=True)
class Usage:
    """What a `Reranker` has done since it was made.

    Attributes:
        documents: Documents scored, duplicates included.
        tokens: Tokens of packs, where a head and a duplicate count once; a head's beginning that is
            kept for many packs does not count.
        prompt_tokens: Tokens of all prompts, each counted whole, as other servers report them.
        truncated: Documents cut to `max_length`.
        repaired: Texts in which lone surrogates were replaced by U+FFFD.
    """

    documents: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    truncated: int = 0
    repaired: int = 0


def rank_documents(
    documents: Sequence[str],
    scores: Sequence[float],
    log_odds: Sequence[float],
    truncated: Sequence[bool],
    windows: Sequence[tuple[int, int] | None],
) -> list[RankedDocument]:
    """Return all documents by falling log-odds; equal ones keep their order.

    Example:
        >>> scores, cut, windows = [0.6, 0.9, 0.6], [False] * 3, [None] * 3
        >>> ranking = rank_documents(["a", "b", "c"], scores, [0.5, 2.0, 0.5], cut, windows)
        >>> [result.index for result in ranking]
        [1, 0, 2]
    """
    order = sorted(range(len(documents)), key=lambda i: -log_odds[i])
    return [
        RankedDocument(i, documents[i], scores[i], log_odds[i], truncated[i], windows[i])
        for i in order
    ]


def in_order(ranking: Sequence[RankedDocument]) -> list[float]:
    """Return the log-odds of a whole ranking in the order in which its documents were given."""
    return [result.log_odds for result in sorted(ranking, key=lambda result: result.index)]


def probability(log_odds: float) -> float:
    """Return the sigmoid of log-odds, written so that neither sign overflows."""
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    return math.exp(log_odds) / (1 + math.exp(log_odds))


def cut_ranking(
    ranking: list[RankedDocument], top_n: int | None, score_threshold: float | None
) -> list[RankedDocument]:
    """Keep results with at least `score_threshold`, then the first `top_n`; None keeps all."""
    if score_threshold is not None:
        ranking = [result for result in ranking if result.score >= score_threshold]
    return ranking[:top_n]


def verify_ranking(
    ranking: Sequence[RankedDocument],
    num_documents: int,
    top_n: int | None,
    score_threshold: float | None,
) -> None:
    """Check what an object in the place of a `Reranker` made of a call's documents.

    Raises:
        RankingError: If documents are missing, repeated, invented, out of order or below the
            threshold.
        NonFiniteScoreError: If a score is NaN or infinite.
    """
    indices = [result.index for result in ranking]
    if len(set(indices)) < len(indices) or not set(indices) <= set(range(num_documents)):
        raise RankingError(
            f"the reranker's result is not an order of the {num_documents} documents it got: "
            "indices repeat or are out of range. Correct the object passed as reranker."
        )
    expected = num_documents if top_n is None else min(top_n, num_documents)
    if len(indices) > expected or (score_threshold is None and len(indices) < expected):
        raise RankingError(
            f"the reranker returned {len(indices)} of {num_documents} documents where {expected} "
            "were asked for; the others would be lost. Correct the object passed as reranker."
        )
    if ranking and not any(result.reranked for result in ranking):
        return  # a server failed, and its caller chose the given order
    broken = [result.index for result in ranking if not math.isfinite(result.score)]
    if broken:
        raise NonFiniteScoreError(
            f"the reranker returned {ranking[indices.index(broken[0])].score} for document "
            f"{broken[0]}; no order can be made of it. Correct the object passed as reranker."
        )
    scores = [result.score for result in ranking]
    if any(later > earlier for earlier, later in pairwise(scores)):
        raise RankingError(
            "the reranker's result is not sorted by falling score. Correct the object passed as "
            "reranker."
        )
    if score_threshold is not None and scores and scores[-1] < score_threshold:
        raise RankingError(
            f"the reranker returned a score of {scores[-1]} below the threshold of "
            f"{score_threshold}. Correct the object passed as reranker."
        )


@runtime_checkable
class Scorer(Protocol):
    """The verbs that integrations use; `Reranker` has them, and so may a fake."""

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RankedDocument]:
        """Return the documents, most relevant first."""
        ...

    async def arank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RankedDocument]:
        """Return what `rank` returns without blocking the event loop."""
        ...

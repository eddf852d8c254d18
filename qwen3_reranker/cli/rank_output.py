"""What `qwen3-reranker rank` prints: an object or a table per query, and a summary.

Knows nothing of options and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from ..call.results import RankedDocument, Usage, in_order
from ..data.candidates import CandidateList, ndcg_at_10
from .terminal import WIDTH, fit


def as_json(candidates: CandidateList, ranking: Sequence[RankedDocument]) -> dict[str, Any]:
    """Return the ranking of one query as an object for JSON."""
    return {
        "query_id": candidates.query_id,
        "query": candidates.query,
        "results": [
            {
                "index": r.index,
                "id": candidates.ids[r.index],
                "score": r.score,
                "log_odds": r.log_odds,
                "truncated": r.truncated,
                "text": r.document,
            }
            for r in ranking
        ],
    }


def table(candidates: CandidateList, ranking: Sequence[RankedDocument]) -> list[str]:
    """Return the lines of one query's table, none wider than a terminal."""
    lines = ["", fit(f"{candidates.query_id}: {candidates.query}")]
    lines.append("rank   score  log-odds  was  document")
    for rank, result in enumerate(ranking, 1):
        mark = "~" if result.truncated else " "
        start = (
            f"{rank:4d}  {result.score:.4f}  {result.log_odds:+8.3f} {result.index + 1:4d}{mark} "
        )
        lines.append(start + fit(result.document, WIDTH - len(start)))
    if any(result.truncated for result in ranking):
        lines.append("  ~ the end of this document was cut to --max-length")
    return lines


def summary(
    lists: Sequence[CandidateList], rankings: Sequence[Sequence[RankedDocument]], usage: Usage
) -> list[str]:
    """Return what was done and, where lists have labels, how well; rankings are uncut."""
    lines = [
        f"queries {len(lists)}, documents {usage.documents}, truncated {usage.truncated}, "
        f"tokens computed {usage.tokens}"
    ]
    judged = [
        (candidates, candidates.labels, ranking)
        for candidates, ranking in zip(lists, rankings, strict=True)
        if candidates.labels is not None
    ]
    if judged:
        before, after = [], []
        for candidates, labels, ranking in judged:
            given = [-float(i) for i in range(len(labels))]
            before.append(ndcg_at_10(labels, given, candidates.missing_labels))
            after.append(ndcg_at_10(labels, in_order(ranking), candidates.missing_labels))
        lines.append(
            f"nDCG@10 {mean(after):.4f}, in the order given {mean(before):.4f} "
            f"({len(judged)} queries with labels)"
        )
    return lines

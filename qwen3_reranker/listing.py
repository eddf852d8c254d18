"""What `qwen3-reranker rank` prints: a table or JSON, and a summary.

Decides how rankings look in a terminal. Knows nothing of options and models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any

from .candidates import CandidateList, ndcg_at_10
from .results import RankedDocument, Usage
from .terminal import WIDTH, fit


def as_json(candidates: CandidateList, ranking: list[RankedDocument]) -> dict[str, Any]:
    """Return a ranking as an object of JSON."""
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


def print_table(candidates: CandidateList, ranking: list[RankedDocument]) -> None:
    """Print a ranking, a line per document."""
    print("\n" + fit(f"{candidates.query_id}: {candidates.query}"))
    print("rank   score  log-odds  was  document")
    for rank, result in enumerate(ranking, 1):
        mark = "~" if result.truncated else " "
        start = (
            f"{rank:4d}  {result.score:.4f}  {result.log_odds:+8.3f} {result.index + 1:4d}{mark} "
        )
        print(start + fit(result.document, WIDTH - len(start)))
    if any(result.truncated for result in ranking):
        print("  ~ the end of this document was cut to --max-length")


def print_summary(
    lists: Sequence[CandidateList], rankings: Sequence[list[RankedDocument]], usage: Usage
) -> None:
    """Print what was done, and nDCG@10 of the queries with labels, to standard error."""
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
            log_odds = {result.index: result.log_odds for result in ranking}
            given = [-float(i) for i in range(len(labels))]
            before.append(ndcg_at_10(labels, given, candidates.missing_labels))
            scores = [log_odds[i] for i in range(len(labels))]
            after.append(ndcg_at_10(labels, scores, candidates.missing_labels))
        lines.append(
            f"nDCG@10 {mean(after):.4f}, in the order given {mean(before):.4f} "
            f"({len(judged)} queries with labels)"
        )
    print("\n" + "\n".join(lines), file=sys.stderr)

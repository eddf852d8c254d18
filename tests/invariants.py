"""What every path to a ranking must satisfy; each test of each path calls this."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qwen3_reranker import RankedDocument


def check_ranking(
    results: Sequence[RankedDocument],
    documents: Sequence[str],
    *,
    top_n: int | None = None,
    score_threshold: float | None = None,
    temperature: float = 1.0,
    bias: float = 0.0,
) -> None:
    """Assert that a ranking is a permutation of its documents, cut only as asked, and sorted."""
    indices = [result.index for result in results]
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(len(documents)))
    if score_threshold is None:
        assert len(results) == min(len(documents), top_n or len(documents))
    assert top_n is None or len(results) <= top_n
    for result in results:
        assert result.document is documents[result.index]
        assert type(result.score) is float
        assert type(result.log_odds) is float
        assert type(result.truncated) is bool
        assert math.isfinite(result.log_odds)
        assert 0 <= result.score <= 1
        calibrated = result.log_odds / temperature + bias
        assert math.isclose(result.score, 1 / (1 + math.exp(-calibrated)), abs_tol=1e-12)
        assert score_threshold is None or result.score >= score_threshold
    order = [(-result.log_odds, result.index) for result in results]
    assert order == sorted(order), "sorted by log-odds, ties in the caller's order"
    by_text: dict[str, set[float]] = {}
    for result in results:
        by_text.setdefault(result.document, set()).add(result.log_odds)
    assert all(len(scores) == 1 for scores in by_text.values()), "duplicates score alike"

"""Judged candidate lists for models with random weights."""

from __future__ import annotations

import json
from pathlib import Path

from qwen3_reranker import Reranker


def write_judgments(file: Path, model: Path, adapter: str | None = None) -> None:
    """Write 32 lists, judged mostly as the model does: what it cannot tell is not calibrated."""
    words = "tea rain capital city river stone bread music".split()
    queries = [f"{word} {i}" for word in words for i in range(4)]
    with Reranker(str(model), adapter=adapter) as reranker:
        rankings = reranker.rank_many(queries, [words] * len(queries))
    log_odds = sorted(result.log_odds for ranking in rankings for result in ranking)
    middle = log_odds[len(log_odds) // 2]
    lines = []
    for i, ranking in enumerate(rankings):
        agrees = [(i + result.index) % 8 > 0 for result in ranking]
        candidates = [
            {"text": result.document, "label": int((result.log_odds > middle) == is_agreed)}
            for result, is_agreed in zip(ranking, agrees, strict=True)
        ]
        lines.append(json.dumps({"query": queries[i], "candidates": candidates}) + "\n")
    file.write_text("".join(lines))

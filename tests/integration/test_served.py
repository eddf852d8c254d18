"""Scores of judged lists that are kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.served import Served, saved_scores
from qwen3_reranker import Reranker
from qwen3_reranker.candidates import CandidateList

LISTS = {
    "first": [CandidateList("1", "rust", None, ["a", "b"], ["iron", "a language"], [1, 0], [])],
    "second": [
        CandidateList("2", "bread", "Find recipes", ["c"], ["flour and water"], [1], []),
        CandidateList("3", "nothing", None, [], [], [], [1]),
    ],
}


def test_interrupted_scoring_goes_on_after_the_last_whole_list(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    rank = Reranker.rank

    def counted(self: Reranker, query: str, *args: Any, **options: Any) -> Any:
        asked.append(query)
        return rank(self, query, *args, **options)

    monkeypatch.setattr(Reranker, "rank", counted)
    served = Served(str(checkpoint()))
    scores = saved_scores(served, LISTS, tmp_path)
    assert [[len(row) for row in rows] for rows in scores.values()] == [[2], [1, 0]]
    assert asked == ["rust", "bread", "nothing"]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    first, second, _ = whole.splitlines(keepends=True)
    for left, again in (
        (first + second[:5], ["bread", "nothing"]),  # killed within a line
        (first + second, ["nothing"]),
        (whole, []),
        (b"[0.", ["rust", "bread", "nothing"]),
    ):
        asked.clear()
        file.write_bytes(left)
        assert saved_scores(served, LISTS, tmp_path) == scores
        assert asked == again
        assert file.read_bytes() == whole

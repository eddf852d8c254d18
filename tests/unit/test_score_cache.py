"""Scores of prompts that come again."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_reranker import NonFiniteScoreError
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget, Pack
from tests.engines import TIMEOUT_S, group, last_id, last_ids, log_odds


def test_known_prompts_are_not_scored_again() -> None:
    seen: list[int] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        seen.extend(last_ids(pack))
        return last_id(pack)

    engine = Engine(score, backend="documents", budget=Budget(100), max_cached_scores=3)
    progress: list[int] = []
    assert log_odds(engine.submit([group(5, 7), group(5, head=2)])) == [[5.0, 7.0], [5.0]]
    again = engine.submit([group(9, 5, 7, 5)], progress=progress.append)
    assert log_odds(again) == [[9.0, 5.0, 7.0, 5.0]]
    assert seen == [5, 7, 5, 9]
    assert sum(progress) == 3, "distinct documents, known or not"
    assert log_odds(engine.submit([group(5, head=2)])) == [[5.0]]
    assert seen == [5, 7, 5, 9, 5], "the bound is three: the oldest went"
    engine.close()


def test_without_being_asked_nothing_is_kept() -> None:
    seen: list[int] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        seen.extend(last_ids(pack))
        return last_id(pack)

    engine = Engine(score, backend="documents", budget=Budget(100))
    for _ in range(2):
        assert log_odds(engine.submit([group(5)])) == [[5.0]]
    assert seen == [5, 5]
    engine.close()


def test_score_that_is_not_finite_is_not_kept() -> None:
    values = iter([np.nan, 1.0])
    engine = Engine(
        lambda pack: np.array([next(values)], np.float32),
        backend="documents", budget=Budget(100), max_cached_scores=3,
    )  # fmt: skip
    with pytest.raises(NonFiniteScoreError):
        engine.submit([group(5)]).result(TIMEOUT_S)
    assert log_odds(engine.submit([group(5)])) == [[1.0]]
    engine.close()

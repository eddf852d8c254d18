from __future__ import annotations

import math

import pytest

from qwen3_reranker import NonFiniteScoreError, RankedDocument, RankingError
from qwen3_reranker.call.results import verify_ranking


def ranking(*indices: int, score: float = 0.5) -> list[RankedDocument]:
    return [RankedDocument(i, "", score, 0.0, False) for i in indices]


@pytest.mark.parametrize(
    ("indices", "top_n", "threshold"),
    [
        ((2, 0, 1), None, None),
        ((1,), 1, None),
        ((0, 1, 2), 9, None),
        ((), None, 0.9),
        ((2,), 2, 0.1),
    ],
)
def test_verify_ranking_accepts_an_order_cut_as_asked(
    indices: tuple[int, ...], top_n: int | None, threshold: float | None
) -> None:
    verify_ranking(ranking(*indices), 3, top_n, threshold)


@pytest.mark.parametrize(
    ("indices", "top_n", "threshold", "message"),
    [
        ((0, 1), None, None, "2 of 3 documents where 3"),
        ((0,), 2, None, "1 of 3 documents where 2"),
        ((0, 1, 2), 2, None, "3 of 3 documents where 2"),
        ((0, 1, 2), 2, 0.1, "3 of 3 documents where 2"),
        ((0, 1, 1), None, None, "indices repeat"),
        ((0, 1, 3), None, None, "out of range"),
        ((0, 1, -1), None, None, "out of range"),
    ],
)
def test_verify_ranking_refuses_lost_repeated_and_invented_documents(
    indices: tuple[int, ...], top_n: int | None, threshold: float | None, message: str
) -> None:
    with pytest.raises(RankingError, match=message):
        verify_ranking(ranking(*indices), 3, top_n, threshold)


def test_verify_ranking_refuses_a_wrong_order_and_scores_below_the_threshold() -> None:
    rising = [*ranking(0, score=0.1), *ranking(1, score=0.9)]
    with pytest.raises(RankingError, match="not sorted"):
        verify_ranking(rising, 2, None, None)
    with pytest.raises(RankingError, match=r"0\.1 below the threshold of 0\.5"):
        verify_ranking(rising[::-1], 2, None, 0.5)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_verify_ranking_refuses_scores_that_are_no_numbers(score: float) -> None:
    broken = [*ranking(2, 0), *ranking(1, score=score)]
    with pytest.raises(NonFiniteScoreError, match="for document 1"):
        verify_ranking(broken, 3, None, None)


def test_verify_ranking_accepts_a_list_left_as_it_was_and_nothing_half_ranked() -> None:
    left = [RankedDocument(i, "", math.nan, math.nan, False, reranked=False) for i in range(3)]
    verify_ranking(left, 3, None, 0.5)
    with pytest.raises(RankingError, match="2 of 3 documents"):
        verify_ranking(left[:2], 3, None, None)
    with pytest.raises(NonFiniteScoreError):
        verify_ranking([*ranking(0), *left[1:]], 3, None, None)

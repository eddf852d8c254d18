"""Published scores of Qwen3-Reranker-0.6B, where its weights are at hand."""

from __future__ import annotations

import os

import pytest

from qwen3_reranker import Reranker
from qwen3_reranker.call.results import in_order

MODEL = os.environ.get("QWEN3_RERANKER_0_6B")
needs_weights = pytest.mark.skipif(
    MODEL is None, reason="set QWEN3_RERANKER_0_6B to the folder or Hub name of the checkpoint"
)


@needs_weights
def test_log_odds_equal_those_of_sentence_transformers_tests() -> None:
    documents = [
        "Venus is often called Earth's twin because of its similar size and proximity.",
        "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
        "Jupiter, the largest planet in our solar system, has a prominent red spot.",
        "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
    ]
    with Reranker(str(MODEL), dtype="float32") as reranker:
        results = reranker.rank("Which planet is known as the Red Planet?", documents)
    log_odds = in_order(results)
    assert log_odds == pytest.approx([-3.109298, 7.120390, -0.378755, 3.541637], abs=1e-3)


@needs_weights
@pytest.mark.parametrize(
    ("query", "document", "probability"),
    [
        ("What is the capital of China?", "The capital of China is Beijing.", 0.9994982),
        ("What is the capital of China?", "The capital of China is Tianjin.", 0.9983009),
        ("What is the capital of China?", "The capital of China is Shanghai.", 0.9993713),
        ("What is the capital of China?", "The capital of Korea is Seoul.", 0.00103),
    ],
)
def test_probabilities_equal_the_published(query: str, document: str, probability: float) -> None:
    with Reranker.shared(str(MODEL), dtype="float32") as reranker:
        assert reranker.score(query, [document])[0] == pytest.approx(probability, abs=1e-4)

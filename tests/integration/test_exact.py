"""Scores that are the same to the last bit in any company, when asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen3_reranker import NonFiniteScoreError, Reranker
from qwen3_reranker.model import loading
from qwen3_reranker.model.network import YesNoCrossEncoder
from tests import texts

POOL = [document for _, document in texts.ordinary_pairs(60)]
NEEDLES = POOL[:5]


def differing(reranker: Reranker, companies: int) -> int:
    """Return in how many random companies a needle's score differs from its score alone."""
    chance = random.Random(0)
    alone = {text: reranker.rank("water", [text])[0].log_odds for text in NEEDLES}
    count = 0
    for _ in range(companies):
        needle = chance.choice(NEEDLES)
        documents = [needle, *chance.sample(POOL, chance.randint(1, 12))]
        chance.shuffle(documents)
        found = {r.document: r.log_odds for r in reranker.rank("water", documents)}
        count += found[needle] != alone[needle]
    return count


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("trials", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_duplicates_are_bit_equal(
    checkpoint: Callable[..., Path], exact: bool, trials: int
) -> None:
    chance, count = random.Random(0), 0
    with Reranker(
        str(checkpoint()), dtype="float32", exact=exact, max_batch_tokens=200
    ) as reranker:
        for _ in range(trials):
            documents = chance.choices(POOL[:8], k=12)
            scores: dict[str, set[float]] = {}
            for result in reranker.rank("water", documents):
                scores.setdefault(result.document, set()).add(result.log_odds)
            count += len(documents) - len(scores)
            assert all(len(found) == 1 for found in scores.values())
    print(f"{count} duplicates in {trials} calls, all bit-equal")
    assert count > trials


@pytest.mark.parametrize("companies", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_exact_scores_are_bit_equal_in_any_company(
    checkpoint: Callable[..., Path], companies: int
) -> None:
    # Wide enough that the library multiplies by blocks, whose shape depends on the rows.
    folder = str(checkpoint(hidden_size=512, intermediate_size=1024, num_hidden_layers=2))
    with Reranker(folder, dtype="float32", exact=True) as reranker:
        differ = differing(reranker, companies)
        assert differ == 0
        assert reranker.loaded.choices["head cache"] == "off, exact"
    with Reranker(folder, dtype="float32") as reranker:
        moved = differing(reranker, companies)
        assert moved > 0, "the control: in packs the last bits move"
    print(f"of {companies} companies {differ} changed a score's bits, {moved} when not exact")


def test_scores_that_overflow_in_half_precision_are_computed_again_in_float32(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint())
    monkeypatch.setattr(loading, "prepacking_pays", lambda dtype: False)  # weights are changed here
    with Reranker(folder, dtype="float32") as reranker:
        _overflow(reranker)
        expected = [r.log_odds for r in reranker.rank("water", NEEDLES)]
    with Reranker(folder, dtype="float16", device="cpu") as reranker:
        _overflow(reranker)
        found = [r.log_odds for r in reranker.rank("water", NEEDLES)]
        assert found == pytest.approx(expected, abs=0.2)
    monkeypatch.setattr(YesNoCrossEncoder, "rescore", YesNoCrossEncoder.score)
    with Reranker(folder, dtype="float16", device="cpu") as reranker:
        _overflow(reranker)
        with pytest.raises(NonFiniteScoreError, match="for 5 documents"):
            reranker.rank("water", NEEDLES)


def _overflow(reranker: Reranker) -> None:
    """Let a layer put out what float16 cannot hold, in two layers."""
    first, second = (
        layer.mlp.down_proj.weight for layer in reranker.loaded.network.decoder.layers[:2]
    )
    with torch.no_grad():
        first *= 60_000
        second *= 60_000

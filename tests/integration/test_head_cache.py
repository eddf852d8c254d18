"""Beginnings computed apart: the same scores, the same bits cold and warm, less work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_reranker import Reranker
from qwen3_reranker.call.results import in_order
from qwen3_reranker.engine.packing import Budget, build_pack, merge_duplicates, plan_packs
from qwen3_reranker.model.loading import load_model
from tests import texts
from tests.official import Official

DOCUMENTS = [document for _, document in texts.ordinary_pairs(40)]


def log_odds(reranker: Reranker, query: str, documents: list[str], **given: Any) -> list[float]:
    ranking = reranker.rank(query, documents, **given)
    return in_order(ranking)


@pytest.mark.parametrize("family", ["Qwen3", pytest.param("Llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [300, 4096], ids=["many packs", "one pack"])
def test_cold_and_warm_calls_give_the_same_bits(
    checkpoint: Callable[..., Path], family: str, budget: int
) -> None:
    folder = checkpoint(family=family, head_dim=16)
    with Reranker(str(folder), dtype="float32", max_batch_tokens=budget) as reranker:
        cold = log_odds(reranker, "water", DOCUMENTS)
        other = log_odds(reranker, "another query", DOCUMENTS[:3])
        assert log_odds(reranker, "water", DOCUMENTS) == cold
        assert len(reranker.loaded.network._beginnings) > 0
    with Reranker(str(folder), dtype="float32", max_batch_tokens=budget) as reranker:
        assert log_odds(reranker, "another query", DOCUMENTS[:3]) == other
    official = Official(folder, dtype=torch.float32)
    assert cold == pytest.approx(
        [official.log_odds("water", document) for document in DOCUMENTS], abs=5e-5
    )


def test_instruction_is_computed_once_for_all_its_queries(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reranker(str(checkpoint()), dtype="float32") as reranker:
        network = reranker.loaded.network
        computed: list[int] = []
        real = network._key_values
        monkeypatch.setattr(
            network, "_key_values", lambda ids: (computed.append(len(ids)), real(ids))[1]
        )
        for query in ("water", "fire", "water"):
            reranker.score(query, DOCUMENTS[:3])
        assert len(computed) == 1
        reranker.score("water", DOCUMENTS[:3], instruction="Find code")
        assert len(computed) == 2
        tokenizer = reranker.loaded.tokenizer
        group = tokenizer.encode_group(None, "water", ["x"], max_length=512)
        assert computed[0] == group.num_shared < len(group.head)


@pytest.mark.parametrize("backend", ["documents", "padded"])
@pytest.mark.parametrize("is_lean", [False, True])
def test_layouts_score_alike(checkpoint: Callable[..., Path], backend: str, is_lean: bool) -> None:
    loaded = load_model(str(checkpoint()), dtype="float32", device="cpu")
    loaded.network.is_lean = is_lean
    group = loaded.tokenizer.encode_group(None, "water", DOCUMENTS, max_length=512)
    groups, _ = merge_duplicates([group])
    scores = []
    for cached in (0, group.num_shared, len(group.head)):
        for budget in (200, 100_000):
            found = np.full(len(groups[0].documents), np.nan, np.float32)
            for seats in plan_packs(groups, Budget(budget, max_cached_tokens=cached)):
                found[list(seats[0].documents)] = loaded.network.score(
                    build_pack(groups, seats, backend=backend)
                )
            scores.append(found)
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], atol=1e-5)


def test_self_test_refuses_a_beginning_that_is_off(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_reranker import ModelLoadError
    from qwen3_reranker.model import network as model

    real = model.YesNoCrossEncoder._key_values
    monkeypatch.setattr(
        model.YesNoCrossEncoder, "_key_values",
        lambda self, ids: [(key.flip(2), value) for key, value in real(self, ids)],
    )  # fmt: skip
    with pytest.raises(ModelLoadError, match="packed scores differ from plain ones"):
        load_model(str(checkpoint()), dtype="float32", device="cpu")

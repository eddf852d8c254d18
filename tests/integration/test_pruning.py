"""The pruned last layer equals the whole one, and is off where it would not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_reranker import model
from qwen3_reranker.loading import load_model
from qwen3_reranker.packing import Group, Seat, build_pack

SHAPES = [[(9, [4])], [(9, [4, 30, 1]), (3, [2]), (40, [600, 7])]]


@pytest.mark.parametrize("shape", SHAPES, ids=["one document", "ragged groups"])
@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_pruned_layer_equals_the_whole_layer(
    checkpoint: Callable[..., Path], family: str, shape: list[tuple[int, list[int]]]
) -> None:
    loaded = load_model(str(checkpoint(family=family, head_dim=16)), device="cpu")
    assert loaded.choices["last layer"].startswith("pruned")
    rng = np.random.default_rng(0)

    def draw(length: int) -> Any:
        return rng.integers(0, 1000, length).astype(np.int32)

    groups = [Group(draw(head), [draw(n) for n in lengths]) for head, lengths in shape]
    seats = [Seat(g, tuple(range(len(group.documents)))) for g, group in enumerate(groups)]
    pack = build_pack(groups, seats, backend="documents")
    pruned = loaded.network.score(pack)
    loaded.network.prunes = False
    np.testing.assert_allclose(pruned, loaded.network.score(pack), rtol=1e-5, atol=1e-5)


def test_layer_that_prunes_wrongly_runs_whole(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    folder = str(checkpoint())
    pack = build_pack([Group(np.arange(5, dtype=np.int32), [np.arange(3, dtype=np.int32)])],
                      [Seat(0, (0,))], backend="documents")  # fmt: skip
    expected = load_model(folder, device="cpu").network.score(pack)
    real = model.last_layer
    monkeypatch.setattr(model, "last_layer", lambda *args: real(*args) + 1.0)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(folder, device="cpu")
    assert loaded.choices["last layer"] == "whole"
    assert "The last layer runs whole" in caplog.text
    assert loaded.network.score(pack) == pytest.approx(expected, abs=1e-5)

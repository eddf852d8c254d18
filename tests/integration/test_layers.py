"""Lean layers equal transformers' own, and are off where they would not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qwen3_reranker import Reranker
from qwen3_reranker.engine.packing import Group, Seat, build_pack
from qwen3_reranker.model import attention, attention_cpu, layers, loading
from qwen3_reranker.model import network as model
from qwen3_reranker.model.loading import load_model
from qwen3_reranker.model.prepacked import PrepackedLinear
from tests.real_parts import skip_unless_packed

TOLERANCES = {
    torch.float32: {"atol": 1e-6, "rtol": 1e-6},
    torch.bfloat16: {"atol": 1e-6, "rtol": 2**-7},  # two roundings
}
SHAPES = [[(9, [4])], [(9, [4, 30, 1]), (3, [2]), (40, [600, 7])]]


@pytest.mark.parametrize("shape", SHAPES, ids=["one document", "ragged groups"])
@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
@pytest.mark.parametrize("backend", ["documents", "padded"])
def test_lean_layers_equal_the_stock_ones(
    checkpoint: Callable[..., Path], backend: str, family: str, shape: list[tuple[int, list[int]]]
) -> None:
    loaded = load_model(str(checkpoint(family=family, head_dim=16)), device="cpu")
    assert loaded.choices["layers"].startswith("lean")
    rng = np.random.default_rng(0)

    def draw(length: int) -> Any:
        return rng.integers(0, 1000, length).astype(np.int32)

    groups = [Group(draw(head), [draw(n) for n in lengths]) for head, lengths in shape]
    seats = [Seat(g, tuple(range(len(group.documents)))) for g, group in enumerate(groups)]
    pack = build_pack(groups, seats, backend=backend)
    lean = loaded.network.score(pack)
    loaded.network.is_lean = False
    np.testing.assert_allclose(lean, loaded.network.score(pack), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_strips_and_sizes_change_no_score(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    documents, found = ["tea", "rain " * 90, "light", "", "snow " * 700], []
    # Strips of all tokens, and of one.
    for numbers, step in ((2**30, 1), (1, 1), (1000, 32), (2**17, 64)):
        monkeypatch.setattr(layers, "_STRIP", numbers)
        for module in (attention_cpu, model):
            monkeypatch.setattr(module, "size_step", lambda *_, step=step: step)
        # Several packs, so that the query's head is computed by itself.
        with Reranker(str(checkpoint(family=family)), device="cpu", max_batch_tokens=300) as each:
            assert each.loaded.choices["layers"].startswith("lean")
            found.append([result.log_odds for result in each.rank("water", documents)])
    np.testing.assert_allclose(found[1:], found[:1] * 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_norm_of_gpus_is_the_same(dtype: torch.dtype) -> None:
    norm = Qwen3RMSNorm(64, eps=1e-3).to(dtype)
    torch.nn.init.uniform_(norm.weight)
    hidden = torch.randn(1, 50, 64).to(dtype)
    hidden[:, :9] *= 1e-3  # where the epsilon counts
    expected = norm.double()(hidden.double())
    norm.to(dtype)
    for found in (layers._normalise_at_once(norm, hidden), layers._normalise(norm, hidden)):
        torch.testing.assert_close(found.double(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.2)])
def test_attention_in_blocks_changes_no_score(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str, bound: float
) -> None:
    scores = {}
    for pays in (True, False):
        monkeypatch.setattr(attention_cpu, "_FEWEST_PRODUCTS", 0)
        for module in (attention, attention_cpu):
            monkeypatch.setattr(module, "blocks_pay", lambda dtype, sizes, pays=pays: pays)
        with Reranker(str(checkpoint(dtype=dtype)), device="cpu", dtype=dtype) as reranker:
            assert ("in blocks" in reranker.loaded.choices["attention"]) is pays
            results = reranker.rank("water", ["tea", "rain " * 90, "light", "", "snow " * 700])
            scores[pays] = {result.index: result.log_odds for result in results}
    assert max(abs(scores[True][i] - scores[False][i]) for i in range(5)) <= bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_matrices_change_no_score(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    skip_unless_packed(getattr(torch, dtype))
    folder, scores = str(checkpoint(dtype=dtype)), {}
    for pays in (True, False):
        monkeypatch.setattr(loading, "prepacking_pays", lambda dtype, pays=pays: pays)
        with Reranker(folder, device="cpu", dtype=dtype) as reranker:
            network = reranker.loaded.network
            packs = isinstance(network.decoder.layers[0].mlp.up_proj, PrepackedLinear)
            assert packs is pays
            said = "28 packed for oneDNN" if pays else "as torch has them"
            assert reranker.loaded.choices["matrices"].startswith(said)
            scores[pays] = reranker.score("water", ["tea", "rain " * 90, "light", ""])
            if pays:
                held = Path("/proc/self/maps")
                assert not held.exists() or folder not in held.read_text(), "weights are here twice"
                pack = build_pack([Group(np.arange(5, dtype=np.int32),
                                  [np.arange(3, dtype=np.int32)])], [Seat(0, (0,))],
                                  backend="documents")  # fmt: skip
                np.testing.assert_allclose(network.rescore(pack), network.score(pack), atol=0.1)
    assert np.ptp(scores[True]) > 0.01
    np.testing.assert_allclose(
        scores[True], scores[False], atol=1e-5 if dtype == "float32" else 0.02
    )


@pytest.mark.parametrize("name", ["run_layer", "last_layer"])
def test_layers_that_compute_something_else_run_as_stock(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: Any, name: str
) -> None:
    folder = str(checkpoint())
    pack = build_pack([Group(np.arange(5, dtype=np.int32), [np.arange(3, dtype=np.int32)])],
                      [Seat(0, (0,))], backend="documents")  # fmt: skip
    expected = load_model(folder, device="cpu").network.score(pack)
    real = getattr(model, name)
    monkeypatch.setattr(model, name, lambda *args: real(*args) + torch.randn(()))
    with caplog.at_level(logging.WARNING):
        loaded = load_model(folder, device="cpu")
    assert loaded.choices["layers"] == "as transformers has them"
    assert "Layers run as transformers has them" in caplog.text
    assert loaded.network.score(pack) == pytest.approx(expected, abs=1e-5)

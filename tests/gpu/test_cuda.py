"""CUDA against CPU and against masked attention on the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen3_reranker import Reranker
from qwen3_reranker.model.attention import check_varlen
from tests import real_parts, texts
from tests.invariants import check_ranking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.5)])
def test_cuda_scores_equal_cpu_scores(
    checkpoint: Callable[..., Path], dtype: str, bound: float
) -> None:
    documents = [document for _, document in texts.ordinary_pairs(50)]
    with Reranker(str(checkpoint()), device="cpu", dtype="float32") as reranker:
        cpu = {r.index: r.log_odds for r in reranker.rank("water", documents)}
    with Reranker(str(checkpoint()), device="cuda", dtype=dtype) as reranker:
        results = reranker.rank("water", documents)
    check_ranking(results, documents)
    assert max(abs(result.log_odds - cpu[result.index]) for result in results) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(16, 8, 128), (32, 8, 128), (4, 2, 32)])
def test_varlen_equals_masked_attention(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    assert check_varlen(torch.device("cuda"), dtype, sizes) == ""


def test_half_precision_runs_without_padding(checkpoint: Callable[..., Path]) -> None:
    documents = [document for _, document in texts.ordinary_pairs(50)]
    with Reranker(str(checkpoint()), device="cuda", dtype="bfloat16") as reranker:
        assert reranker.loaded.backend == "varlen", reranker.loaded.choices["attention"]
        together = {r.index: r.log_odds for r in reranker.rank("water", documents)}
        alone = [reranker.rank("water", [document])[0].log_odds for document in documents]
    differences = [abs(together[i] - value) for i, value in enumerate(alone)]
    print(f"bfloat16, alone against in company: at most {max(differences):.2g} in log-odds")
    assert max(differences) <= 0.25


def test_lean_layers_score_as_the_stock_ones_in_less_time(tmp_path: Path) -> None:
    shape = {**real_parts.QWEN3_0_6B, "num_hidden_layers": 8}
    folder = real_parts.save_random_qwen3(tmp_path, dtype="bfloat16", **shape)
    documents = [f"tea and milk {i} " * 25 for i in range(100)]
    scores, milliseconds = {}, dict.fromkeys((False, True), math.inf)
    with Reranker(str(folder), device="cuda", dtype="bfloat16") as reranker:
        assert reranker.loaded.choices["layers"].startswith("lean")
        for is_lean in (False, True) * 6:
            reranker.loaded.network.is_lean = is_lean
            torch.cuda.synchronize()
            start = time.perf_counter()
            results = reranker.rank("water", documents)
            passed = 1e3 * (time.perf_counter() - start)
            milliseconds[is_lean] = min(milliseconds[is_lean], passed)
            scores[is_lean] = {result.index: result.log_odds for result in results}
    print(
        f"100 documents, 8 layers: stock {milliseconds[False]:.1f} ms, "
        f"lean {milliseconds[True]:.1f} ms"
    )
    assert max(abs(scores[True][i] - scores[False][i]) for i in range(100)) <= 0.25
    assert milliseconds[True] <= 1.05 * milliseconds[False]


def test_long_query_is_not_copied_for_each_document(tmp_path: Path) -> None:
    shape = {**real_parts.QWEN3_0_6B, "num_hidden_layers": 2}
    folder = real_parts.save_random_qwen3(tmp_path, dtype="bfloat16", **shape)
    with Reranker(str(folder), device="cuda", dtype="bfloat16") as reranker:
        reranker.score("warm up", ["tea"])
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        scores = reranker.score("water " * 4000, [f"tea and milk {i} " * 15 for i in range(500)])
        peak = (torch.cuda.max_memory_allocated() - loaded) / 2**30
    print(f"4,000 tokens before 500 documents: {peak:.2f} GiB above the weights")
    assert len(scores) == 500
    assert peak < 8, "copied, keys and values alone would take 8 GiB"


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.55), ("nf4", 0.33)])
def test_fewer_bits_score_alike_in_less_memory(tmp_path: Path, dtype: str, share: float) -> None:
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    shape = {**real_parts.QWEN3_0_6B, "num_hidden_layers": 2}
    folder = str(real_parts.save_random_qwen3(tmp_path, dtype="bfloat16", **shape))
    documents = [document for _, document in texts.ordinary_pairs(50)]
    with Reranker(folder, device="cpu", dtype="float32" if dtype == "int8" else dtype) as reranker:
        cpu = reranker.rank("water", documents)
    results, layers = {}, {}
    for name in ("bfloat16", dtype):
        with Reranker(folder, device="cuda", dtype=name) as reranker:
            results[name] = {r.index: r.log_odds for r in reranker.rank("water", documents)}
            decoder = reranker.loaded.network.decoder.layers
            tensors = [*decoder.parameters(), *decoder.buffers()]
            layers[name] = sum(tensor.nbytes for tensor in tensors)
    assert layers[dtype] < share * layers["bfloat16"]
    assert max(abs(each.log_odds - results[dtype][each.index]) for each in cpu) <= 0.5

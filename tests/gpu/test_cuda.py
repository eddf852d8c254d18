"""CUDA against CPU on the same weights; also the place where GPU backends will be proven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen3_reranker import Reranker
from tests import texts
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

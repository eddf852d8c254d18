from __future__ import annotations

import numpy as np
import torch

from qwen3_reranker.model.prefix_cache import HeadCache, KeyValues
from qwen3_reranker.text.tokenizer import TokenIds


def ids(*values: int) -> TokenIds:
    return np.array(values, np.int32)


class Counting:
    def __init__(self) -> None:
        self.computed: list[list[int]] = []

    def __call__(self, ids: TokenIds) -> KeyValues:
        self.computed.append(ids.tolist())
        return [(torch.tensor(len(self.computed)), torch.tensor(0))]


def test_beginning_is_computed_once_and_kept_by_its_ids() -> None:
    cache, compute = HeadCache(10), Counting()
    first = cache.get(ids(1, 2), compute)
    assert cache.get(ids(1, 2), compute) is first
    assert cache.get(ids(1, 3), compute) is not first
    assert compute.computed == [[1, 2], [1, 3]]
    assert len(cache) == 4


def test_least_recently_used_goes_first_and_the_bound_holds() -> None:
    cache, compute = HeadCache(5), Counting()
    cache.get(ids(1, 1), compute)
    cache.get(ids(2, 2), compute)
    cache.get(ids(1, 1), compute)
    cache.get(ids(3, 3), compute)
    assert len(cache) == 4
    cache.get(ids(1, 1), compute)
    assert compute.computed == [[1, 1], [2, 2], [3, 3]]
    cache.get(ids(2, 2), compute)
    assert compute.computed[-1] == [2, 2]


def test_beginning_above_the_bound_is_returned_but_not_kept() -> None:
    cache, compute = HeadCache(2), Counting()
    cache.get(ids(1), compute)
    assert cache.get(ids(1, 2, 3), compute)
    assert len(cache) == 0

"""Keys and values of prompt beginnings that many packs share.

Every prompt under one instruction begins with the same tokens, and every pack of a long list with
the same query. What attention needs of them is computed once, by a forward of their own, and kept.
A cold call fills the cache by the very forward whose result a warm call reuses, so that both give
the same bits. Knows nothing of text; bounded, least recently used first to go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from ..text.tokenizer import TokenIds

if TYPE_CHECKING:
    import torch

KeyValues: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
"""Keys and values of each layer, shape (1, key heads, tokens, head size) each."""


class HeadCache:
    """Keeps beginnings by their token ids; belongs to one network, whose weights never change.

    Args:
        max_tokens: Tokens kept in all; no beginning is longer.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: OrderedDict[bytes, KeyValues] = OrderedDict()
        self._num_tokens = 0

    def get(self, ids: TokenIds, compute: Callable[[TokenIds], KeyValues]) -> KeyValues:
        """Return what `compute` returns for these ids, from memory if it is there."""
        key = ids.tobytes()
        found = self._kept.pop(key, None)
        if found is None:
            found = compute(ids)
            self._num_tokens += len(ids)
        self._kept[key] = found
        while self._num_tokens > self._max_tokens:
            dropped, _ = self._kept.popitem(last=False)
            self._num_tokens -= len(dropped) // ids.itemsize
        return found

    def __len__(self) -> int:
        """Return the tokens kept."""
        return self._num_tokens

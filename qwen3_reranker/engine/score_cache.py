"""Scores of prompts that come again and again. Off unless asked for.

Keyed by the ids of the whole prompt, so that what is the same to the model is the same here, and
kept as digests: no text and no ids stay in memory. Bounded, least recently used first to go.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from ..text.tokenizer import TokenIds


class ScoreCache:
    """Keeps log-odds; belongs to one model and one thread.

    Args:
        max_scores: Scores kept; 0 keeps none.
    """

    def __init__(self, max_scores: int) -> None:
        self._max_scores = max_scores
        self._kept: OrderedDict[bytes, float] = OrderedDict()

    @staticmethod
    def key(head: TokenIds, document: TokenIds) -> bytes:
        """Return the digest of a prompt; lengths keep (head, document) apart."""
        digest = hashlib.blake2b(len(head).to_bytes(8, "little"), digest_size=16)
        digest.update(head.tobytes())
        digest.update(document.tobytes())
        return digest.digest()

    def find(self, key: bytes) -> float | None:
        """Return the log-odds kept, or None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, key: bytes, log_odds: float) -> None:
        """Keep log-odds, and let the oldest go."""
        self._kept[key] = log_odds
        while len(self._kept) > self._max_scores:
            self._kept.popitem(last=False)

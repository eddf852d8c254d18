"""What tests of the engine share: documents of one token, and networks that score by it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qwen3_reranker.engine.packing import Pack
from qwen3_reranker.engine.request import ScoresFuture
from qwen3_reranker.text.tokenizer import EncodedGroup

Score = Callable[[Pack], NDArray[np.float32]]
TIMEOUT_S = 10


def group(*documents: int, head: int = 1) -> EncodedGroup:
    """Return documents of one token each; a document's score will be that token."""
    ids = [np.array([document], np.int32) for document in documents]
    return EncodedGroup(np.array([head], np.int32), ids, [False] * len(ids), 0)


def last_ids(pack: Pack) -> list[int]:
    return [int(pack.token_ids[i]) for i in pack.last_tokens]


def last_id(pack: Pack) -> NDArray[np.float32]:
    return np.array(last_ids(pack), np.float32)


def log_odds(future: ScoresFuture) -> list[list[float]]:
    return [row.tolist() for row in future.result(TIMEOUT_S).log_odds]


class Gate:
    """Scores by the last id, but only once it is open; remembers what it scored."""

    def __init__(self) -> None:
        self.started, self.open = threading.Event(), threading.Event()
        self.forwards: list[list[int]] = []

    def __call__(self, pack: Pack) -> NDArray[np.float32]:
        self.started.set()
        assert self.open.wait(TIMEOUT_S)
        self.forwards.append(last_ids(pack))
        return last_id(pack)

"""Stand-ins for a model: deterministic, and small enough to work out by hand.

Packing and engine beside them are the real ones, and so is `PromptTokenizer`, over few words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget, Pack
from qwen3_reranker.runtime import Runtime
from qwen3_reranker.text.tokenizer import PromptTokenizer
from tests.small_tokenizer import small_tokenizer_json

QUERY = "red apple"
# Words shared with the query: 0, 2, 1, 0, 1.
FRUIT = ["green pear", "red apple", "red pear", "blue plum", "green apple"]


@cache
def small_tokenizer() -> PromptTokenizer:
    """Return the small tokenizer with the official prompt, built once per process."""
    return PromptTokenizer(small_tokenizer_json())


def head_ids(instruction: str | None, query: str) -> list[int]:
    """Return the ids that stand before every document."""
    group = small_tokenizer().encode_group(instruction, query, [], max_length=8192)
    return [int(id) for id in group.head]


class FakeNetwork:
    """Log-odds are the number of distinct tokens a document shares with its head, less 1.5."""

    def __init__(self) -> None:
        self.packs: list[Pack] = []

    def score(self, pack: Pack) -> NDArray[np.float32]:
        """Return the log-odds of a pack and remember it."""
        self.packs.append(pack)
        num_suffix = len(small_tokenizer().suffix)
        log_odds = []
        for span in pack.spans:
            head = set(pack.token_ids[span.head].tolist())
            for document in span.documents:
                body = set(pack.token_ids[document][:-num_suffix].tolist())
                log_odds.append(len(body & head) - 1.5)
        return np.array(log_odds, np.float32)

    def rescore(self, pack: Pack) -> NDArray[np.float32]:
        """Return the same: nothing here can overflow."""
        return self.score(pack)

    @property
    def heads(self) -> list[list[int]]:
        """Token ids of the heads seen, in order."""
        return [pack.token_ids[span.head].tolist() for pack in self.packs for span in pack.spans]


@dataclass(slots=True, weakref_slot=True)
class FakeModel:
    """Has what the facade and the runtime read of a `LoadedModel`."""

    network: Any = field(default_factory=FakeNetwork)
    tokenizer: PromptTokenizer = field(default_factory=small_tokenizer)
    max_positions: int = 40960
    budget: Budget = field(default_factory=lambda: Budget(2048))
    backend: str = "documents"
    fingerprint: str = "of the fake"
    choices: dict[str, str] = field(default_factory=dict)


@contextmanager
def loaded(monkeypatch: pytest.MonkeyPatch, model: FakeModel) -> Iterator[Engine]:
    """Make every runtime return this model and one engine, which is yielded."""
    engine = Engine(
        model.network.score,
        backend=model.backend,
        budget=model.budget,
        rescore=getattr(model.network, "rescore", None),
    )
    monkeypatch.setattr(Runtime, "load", lambda self: (model, engine))
    yield engine
    engine.close()


def leaking(query: Any, key: Any, value: Any, span: Any, outside: Any, scaling: float) -> Any:
    """Attend so that documents see their neighbours: an attention backend that must be noticed."""
    import torch

    from qwen3_reranker.model.attention_cpu import attend_tail

    row = slice(span.head.start, span.documents[-1].stop)
    query, key, value = (tensor[:, :, row] for tensor in (query, key, value))
    if outside is not None:
        key, value = (torch.cat(both, dim=2) for both in zip(outside, (key, value), strict=True))
    return attend_tail(query, key, value, scaling).transpose(1, 2)


def replace_load_model(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """Make the real `Runtime.load` call this function; torch is not imported then."""
    module = ModuleType("qwen3_reranker.model.loading")
    module.load_model = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qwen3_reranker.model.loading", module)


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is asked for."""
    monkeypatch.setattr(Runtime, "load", lambda self: pytest.fail("a model was asked for"))

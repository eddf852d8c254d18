"""Fixtures of unit tests: a fake model in the place of a checkpoint, and engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qwen3_reranker import Reranker
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget
from qwen3_reranker.engine.request import ScoresFuture
from tests import fakes
from tests.engines import TIMEOUT_S, Gate, Score, group


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[fakes.FakeModel]:
    """Return a fake network that `Reranker` loads whatever its settings."""
    model = fakes.FakeModel()
    with fakes.loaded(monkeypatch, model):
        yield model


@pytest.fixture
def reranker(model: fakes.FakeModel) -> Reranker:
    return Reranker("model")


@pytest.fixture
def make() -> Iterator[Callable[..., Engine]]:
    """Return a function that makes engines, which are closed after the test."""
    engines = []

    def make(score: Score, **settings: Any) -> Engine:
        engines.append(Engine(score, **{"backend": "fake", "budget": Budget(100), **settings}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def gated(gate: Gate, make: Callable[..., Engine]) -> tuple[Engine, ScoresFuture]:
    """Return an engine whose first request, of document 100, is held in its forward."""
    engine = make(gate, max_waiting=3)
    first = engine.submit([group(100)])
    assert gate.started.wait(TIMEOUT_S)
    return engine, first

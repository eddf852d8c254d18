"""Interrupted callers of a model leave nothing held."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.output import hash_file
from qwen3_reranker import Reranker
from qwen3_reranker.checkpoint.embedded import embedded_folder
from tests import fakes
from tests.attacks.interrupts import interrupt_at_random, interrupted
from tests.attacks.limits import bounded
from tests.fakes import FRUIT, QUERY

pytestmark = pytest.mark.attack


class _Forgetful(fakes.FakeNetwork):
    """Keeps no packs, of which there are too many."""

    def score(self, pack: Any) -> Any:
        self.packs.clear()
        return super().score(pack)


def _answers_in_time(reranker: Reranker, seconds: float = 5) -> bool:
    """Say whether another thread's call is scored."""
    scores: list[list[float]] = []
    other = threading.Thread(target=lambda: scores.append(reranker.score(QUERY, FRUIT)))
    other.daemon = True
    other.start()
    other.join(seconds)
    return len(scores) == 1 and len(scores[0]) == len(FRUIT)


@pytest.mark.parametrize("is_watched", [False, True], ids=["plain", "with a bar"])
def test_interrupt_anywhere_in_a_call_wedges_nothing(
    monkeypatch: pytest.MonkeyPatch, tried: Callable[[int], None], is_watched: bool
) -> None:
    monkeypatch.setattr("qwen3_reranker.engine.progress._is_watched", lambda: is_watched)
    k = 0
    with fakes.loaded(monkeypatch, fakes.FakeModel(_Forgetful())):
        reranker = Reranker("model")
        expected = reranker.score(QUERY, FRUIT)
        with bounded(seconds=300, megabytes=100):
            while interrupted(lambda: reranker.rank(QUERY, FRUIT, timeout_s=20), k + 1):
                k += 1
                assert _answers_in_time(reranker), f"no answer after an interrupt at place {k}"
        assert reranker.score(QUERY, FRUIT) == expected
    assert k > 100
    tried(k)


def test_interrupts_at_random_moments_wedge_nothing(
    monkeypatch: pytest.MonkeyPatch, tried: Callable[[int], None]
) -> None:
    with fakes.loaded(monkeypatch, fakes.FakeModel(_Forgetful())):
        reranker = Reranker("model")
        expected = reranker.score(QUERY, FRUIT)

        def call() -> None:
            assert reranker.score(QUERY, FRUIT, timeout_s=30) == expected

        with bounded(seconds=300, megabytes=100):
            assert interrupt_at_random(call, 10_000) == []
        assert _answers_in_time(reranker)
    tried(10_000)


def test_conversion_that_was_killed_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    """It left up to 540 MB in the user's cache for good."""
    cache = tmp_path / "qwen3-reranker"
    command = [
        sys.executable,
        "-c",
        "from qwen3_reranker.checkpoint import embedded; embedded.embedded_folder()",
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def written() -> int:
        return sum(file.stat().st_size for file in cache.rglob("model.safetensors"))

    with subprocess.Popen(command, env=environment) as process:
        while written() < 10_000_000:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.kill()
    assert written() > 0
    assert not list(cache.glob("smollm2-*")), "it was done before it could be killed"
    subprocess.run(command, env=environment, check=True)
    (model,) = cache.iterdir()
    for file in embedded_folder().iterdir():
        assert hash_file(model / file.name) == hash_file(file)

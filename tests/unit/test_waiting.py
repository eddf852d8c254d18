"""Calls that wait: from threads and tasks, cancelled, timed out, interrupted."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_reranker import (
    ClosedError,
    InputError,
    Reranker,
    TimedOutError,
)
from qwen3_reranker.call.futures import LockFreeFuture
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget, Pack
from qwen3_reranker.engine.request import Scores
from tests import fakes
from tests.fakes import FRUIT, QUERY, head_ids
from tests.invariants import check_ranking


async def test_arank_returns_what_rank_returns(reranker: Reranker) -> None:
    ranking = await reranker.arank(QUERY, FRUIT, top_n=4, score_threshold=0.2)
    check_ranking(ranking, FRUIT, top_n=4, score_threshold=0.2)
    assert ranking == reranker.rank(QUERY, FRUIT, top_n=4, score_threshold=0.2)


async def test_ascore_returns_what_score_returns(reranker: Reranker) -> None:
    assert await reranker.ascore(QUERY, FRUIT) == reranker.score(QUERY, FRUIT)
    pairs = [(QUERY, FRUIT[0]), ("other", FRUIT[1])]
    assert await reranker.ascore_pairs(pairs) == reranker.score_pairs(pairs)


async def test_arank_many_tasks_each_get_their_own(reranker: Reranker) -> None:
    lists = [[*FRUIT[i % 5 :], f"red {i}"] for i in range(64)]
    rankings = await asyncio.gather(*(reranker.arank(QUERY, documents) for documents in lists))
    for documents, ranking in zip(lists, rankings, strict=True):
        check_ranking(ranking, documents)
    assert rankings == [reranker.rank(QUERY, documents) for documents in lists]


def test_rank_from_many_threads_each_gets_its_own(reranker: Reranker) -> None:
    lists = [[*FRUIT[i % 5 :], f"red {i}"] for i in range(200)]
    with ThreadPoolExecutor(16) as threads:
        rankings = list(threads.map(lambda documents: reranker.rank(QUERY, documents), lists))
    for documents, ranking in zip(lists, rankings, strict=True):
        check_ranking(ranking, documents)
    assert reranker.usage.documents == sum(map(len, lists))
    assert rankings == [reranker.rank(QUERY, documents) for documents in lists]


class WaitingNetwork(fakes.FakeNetwork):
    """Starts a forward and waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.go = threading.Event(), threading.Event()

    def score(self, pack: Any) -> Any:
        self.started.set()
        assert self.go.wait(10)
        return super().score(pack)


def count_submits(monkeypatch: pytest.MonkeyPatch, expected: int) -> threading.Event:
    """Return an event that is set when so many requests have been queued from now on."""
    queued, submit, futures = threading.Event(), Engine.submit, []

    def counting(engine: Engine, *arguments: Any, **settings: Any) -> Any:
        futures.append(submit(engine, *arguments, **settings))
        if len(futures) == expected:
            queued.set()
        return futures[-1]

    monkeypatch.setattr(Engine, "submit", counting)
    return queued


async def test_arank_cancelled_calls_are_never_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    network = WaitingNetwork()
    with fakes.loaded(monkeypatch, fakes.FakeModel(network)):
        reranker = Reranker("model")
        in_flight = asyncio.create_task(reranker.arank(QUERY, FRUIT))
        assert await asyncio.to_thread(network.started.wait, 10)
        queued = count_submits(monkeypatch, 12)
        tasks = [asyncio.create_task(reranker.arank(f"{i}", FRUIT)) for i in range(12)]
        assert await asyncio.to_thread(queued.wait, 10)
        for task in tasks[::2]:
            task.cancel()
        dropped = await asyncio.gather(*tasks[::2], return_exceptions=True)
        network.go.set()
        rankings = await asyncio.gather(in_flight, *tasks[1::2])
    assert all(isinstance(result, asyncio.CancelledError) for result in dropped)
    kept = [QUERY, *(f"{i}" for i in range(1, 12, 2))]
    assert sorted(network.heads) == sorted(head_ids(None, query) for query in kept)
    for ranking in rankings:
        check_ranking(ranking, FRUIT)
    assert reranker.usage.documents == 7 * len(FRUIT)


async def test_arank_timeout_leaves_the_reranker_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    network = WaitingNetwork()
    with fakes.loaded(monkeypatch, fakes.FakeModel(network)):
        reranker = Reranker("model")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reranker.arank(QUERY, FRUIT), 0.05)
        network.go.set()
        check_ranking(await reranker.arank(QUERY, FRUIT), FRUIT)
        assert reranker.usage.documents == len(FRUIT)


class Slow(fakes.FakeNetwork):
    """Takes its time."""

    def score(self, pack: Pack) -> NDArray[np.float32]:
        time.sleep(0.1)
        return super().score(pack)


async def test_call_that_takes_longer_than_its_timeout_is_told_and_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fakes.FakeModel(network=Slow(), budget=Budget(120))
    documents = [f"red pear {i}" for i in range(100)]
    with fakes.loaded(monkeypatch, model):
        reranker = Reranker("model")
        started = time.monotonic()
        with pytest.raises(TimedOutError, match="100 documents were not scored within timeout_s"):
            reranker.rank(QUERY, documents, timeout_s=0.15)
        with pytest.raises(TimeoutError, match="send fewer"):
            await reranker.ascore(QUERY, documents, timeout_s=0.15)
        assert time.monotonic() - started < 1.5
        assert len(model.network.packs) < 10, "what was left was dropped"
        assert reranker.score(QUERY, ["red pear"], timeout_s=60)
        assert reranker.rank_many([QUERY], [["pear"]], timeout_s=60)
        assert reranker.score_pairs([(QUERY, "pear")], timeout_s=60)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), "5", True])
def test_timeout_that_is_no_time_is_refused(reranker: Reranker, timeout_s: Any) -> None:
    with pytest.raises(InputError, match="timeout_s must be a number of seconds above 0"):
        reranker.rank(QUERY, FRUIT, timeout_s=timeout_s)


async def test_arank_leaves_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    network = WaitingNetwork()
    with fakes.loaded(monkeypatch, fakes.FakeModel(network)):
        task = asyncio.create_task(Reranker("model").arank(QUERY, FRUIT))
        while not network.started.is_set():
            await asyncio.sleep(0.001)
        network.go.set()  # from the loop, which a blocking call would have stopped
        check_ranking(await task, FRUIT)


def test_rank_interrupted_while_waiting_drops_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(LockFreeFuture[Scores]):
        def result(self, timeout_s: float | None = None) -> Scores:
            raise KeyboardInterrupt

    future = Interrupted()
    with fakes.loaded(monkeypatch, fakes.FakeModel()) as engine:
        monkeypatch.setattr(engine, "submit", lambda groups, **settings: future)
        with pytest.raises(KeyboardInterrupt):
            Reranker("model").rank(QUERY, FRUIT)
    assert future.is_abandoned


def test_close_fails_calls_that_wait_and_finishes_the_forward_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = WaitingNetwork()
    fakes.replace_load_model(monkeypatch, lambda **settings: fakes.FakeModel(network))
    reranker = Reranker("model")
    with ThreadPoolExecutor(3) as threads:
        in_flight = threads.submit(reranker.rank, QUERY, FRUIT)
        assert network.started.wait(10)
        queued = count_submits(monkeypatch, 1)
        waiting = threads.submit(reranker.rank, QUERY, FRUIT)
        assert queued.wait(10)
        closing = threads.submit(reranker.close)
        with pytest.raises(ClosedError, match="closed while this call waited"):
            waiting.result(10)
        network.go.set()
        check_ranking(in_flight.result(10), FRUIT)
        closing.result(10)
    assert len(network.packs) == 1


def test_call_beside_a_bar_is_late_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_reranker.engine.progress._is_watched", lambda: True)
    model = fakes.FakeModel(network=Slow(), budget=Budget(120))
    with fakes.loaded(monkeypatch, model):
        with pytest.raises(TimedOutError, match="not scored within timeout_s"):
            Reranker("model").rank(QUERY, [f"pear {i}" for i in range(100)], timeout_s=0.15)
        check_ranking(Reranker("model").rank(QUERY, FRUIT), FRUIT)
    assert len(model.network.packs) < 10, "what was left was dropped"


def test_error_of_the_model_that_is_a_timeout_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(fakes.FakeNetwork):
        def score(self, pack: Pack) -> NDArray[np.float32]:
            raise TimeoutError("of a file system")

    with (
        fakes.loaded(monkeypatch, fakes.FakeModel(Failing())),
        pytest.raises(TimeoutError, match="of a file system"),
    ):
        Reranker("model").rank(QUERY, FRUIT, timeout_s=60)


async def test_result_that_comes_when_the_caller_has_left_wakes_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = WaitingNetwork()
    with fakes.loaded(monkeypatch, fakes.FakeModel(network)):
        reranker = Reranker("model")
        task = asyncio.create_task(reranker.arank(QUERY, FRUIT))
        assert await asyncio.to_thread(network.started.wait, 10)
        task.cancel()
        network.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        check_ranking(await reranker.arank(QUERY, FRUIT), FRUIT)

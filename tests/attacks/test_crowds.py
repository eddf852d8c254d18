"""Crowds: many callers with much, beside one with little; timers that come early; broken observers.

The network is a fake that takes as long as it is told, so that what is measured is who waits for
whom.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import statistics
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
import uvloop

from qwen3_reranker import Qwen3RerankerError, Reranker, TimedOutError
from qwen3_reranker.engine.packing import Budget
from qwen3_reranker.engine.turns import Turns
from qwen3_reranker.text.steps import Steps
from tests import fakes
from tests.attacks.limits import bounded
from tests.fakes import FRUIT, QUERY
from tests.real_parts import qwen3_tokenizer

pytestmark = pytest.mark.attack

PACK_S = 0.02


class Slow(fakes.FakeNetwork):
    """Takes its time for each pack."""

    def score(self, pack: Any) -> Any:
        time.sleep(PACK_S)
        self.packs.clear()
        return super().score(pack)


def test_few_documents_beside_a_crowd_with_many(monkeypatch: pytest.MonkeyPatch) -> None:
    long = [f"number {i} " + "of a long document " * 400 for i in range(1000)]
    with fakes.loaded(monkeypatch, fakes.FakeModel(Slow(), qwen3_tokenizer(), budget=Budget(4096))):
        reranker = Reranker("model", max_length=2048)
        reranker.score(QUERY, FRUIT)

        async def crowd() -> list[float]:
            async def bulk(i: int) -> None:
                with suppress(Qwen3RerankerError):  # what is left at the end is dropped
                    while True:
                        await reranker.arank(f"bulk {i}", long)

            tasks = [asyncio.create_task(bulk(i)) for i in range(8)]
            await asyncio.sleep(0.3)

            async def few(i: int) -> float:
                await asyncio.sleep(0.05 * i)  # they come whether those before are answered or not
                started = time.monotonic()
                await reranker.arank(f"{QUERY} {i}", FRUIT[:2])
                return time.monotonic() - started

            waits = await asyncio.gather(*map(few, range(100)))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return waits

        with bounded(seconds=120, megabytes=800):
            waits = asyncio.run(crowd())
    p95 = statistics.quantiles(waits, n=20)[-1]
    assert p95 <= 2 * PACK_S + 0.4, f"p95 {p95:.2f} s"


def test_small_call_is_not_behind_a_long_query(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes.loaded(monkeypatch, fakes.FakeModel(tokenizer=qwen3_tokenizer())):
        reranker = Reranker("model")
        reranker.score(QUERY, FRUIT)

        async def main() -> float:
            refused = [
                asyncio.create_task(reranker.arank("1" * 4_000_000, ["d"])) for _ in "abcdefgh"
            ]
            await asyncio.sleep(0)
            started = time.monotonic()
            await reranker.arank(QUERY, FRUIT[:2])
            took = time.monotonic() - started
            for error in await asyncio.gather(*refused, return_exceptions=True):
                assert isinstance(error, Qwen3RerankerError)
            return took

        with bounded(seconds=10, megabytes=400):
            assert asyncio.run(main()) < 3


def test_crowd_costs_as_much_as_its_calls_do() -> None:
    """Who is next is not looked for among all of them at every step."""

    def work() -> Steps[None]:
        yield 1
        yield 1

    turns = Turns()
    with bounded(seconds=10, megabytes=200):
        crowd = [turns.submit(work()) for _ in range(20_000)]
        for future in crowd[::2]:
            future.abandon()
        for future in crowd[1::2]:
            future.result()
    turns.stop()
    turns.thread.join()


def test_large_call_leaves_the_loop_free(
    monkeypatch: pytest.MonkeyPatch, tried: Callable[[int], None]
) -> None:
    """By thread time, so that what other threads do meanwhile is not counted."""
    longest = 0.0
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.events.Handle) -> None:
        nonlocal longest
        started = time.thread_time()
        run(handle)
        longest = max(longest, time.thread_time() - started)

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    documents = [f"red pear {i}" for i in range(100_000)]
    pairs = [(QUERY, document) for document in documents]

    async def alone(call: Coroutine[Any, Any, Any]) -> None:
        await asyncio.wait({asyncio.create_task(call)})
        await asyncio.sleep(0)

    within = []
    with fakes.loaded(
        monkeypatch, fakes.FakeModel(tokenizer=qwen3_tokenizer(), budget=Budget(8192))
    ):
        reranker = Reranker("model")
        for _ in range(5):
            longest = 0.0
            asyncio.run(alone(reranker.arank(QUERY, documents)))
            asyncio.run(alone(reranker.ascore(QUERY, documents)))
            asyncio.run(alone(reranker.ascore_pairs(pairs)))
            within.append(longest <= 0.05)
    assert sum(within) >= 4
    tried(15)


class EarlyLoop(asyncio.SelectorEventLoop):
    """Its timers come half a millisecond early, as uvloop's do."""

    def call_at(self, when: float, *arguments: Any, **settings: Any) -> Any:
        return super().call_at(when - 0.0005, *arguments, **settings)


@pytest.mark.parametrize("new_loop", [EarlyLoop, uvloop.new_event_loop], ids=["early", "uvloop"])
def test_timers_that_come_early_raise_our_error(
    monkeypatch: pytest.MonkeyPatch,
    tried: Callable[[int], None],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    gate = threading.Event()

    class Held(fakes.FakeNetwork):
        def score(self, pack: Any) -> Any:
            assert gate.wait(60)
            return super().score(pack)

    async def late(reranker: Reranker) -> None:
        with pytest.raises(TimedOutError):
            await reranker.arank(QUERY, FRUIT, timeout_s=0.002)

    async def main(reranker: Reranker) -> None:
        for _ in range(50):
            await asyncio.gather(*(late(reranker) for _ in range(20)))

    with fakes.loaded(monkeypatch, fakes.FakeModel(Held())):
        reranker = Reranker("model")
        with bounded(seconds=60, megabytes=100), asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main(reranker))
        gate.set()
        assert len(reranker.score(QUERY, FRUIT)) == len(FRUIT)
    tried(1000)


def test_observer_that_exits_fails_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(record: object) -> None:
        raise SystemExit

    with fakes.loaded(monkeypatch, fakes.FakeModel()):
        reranker = Reranker("model")
        reranker.observe(leave)
        for _ in range(20):
            assert len(reranker.score(QUERY, FRUIT)) == len(FRUIT)

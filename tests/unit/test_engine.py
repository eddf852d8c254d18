from __future__ import annotations

import contextlib
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_reranker import (
    ClosedError,
    OverloadedError,
    ReentryError,
)
from qwen3_reranker.engine.engine import Engine, PackRecord
from qwen3_reranker.engine.packing import Budget, Pack
from qwen3_reranker.engine.request import ScoresFuture
from qwen3_reranker.runtime import Runtime
from qwen3_reranker.text.steps import Steps
from tests.engines import TIMEOUT_S, Gate, group, last_id, last_ids, log_odds


class Peak:
    """Scores by the last id and counts how many do so at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = self.peak = self.calls = 0

    def __call__(self, pack: Pack) -> NDArray[np.float32]:
        with self.lock:
            self.calls += 1
            self.running += 1
            self.peak = max(self.peak, self.running)
        time.sleep(0.002)  # long enough for another thread to come in
        with self.lock:
            self.running -= 1
        return last_id(pack)


def test_scores_are_aligned_with_groups_and_documents(make: Callable[..., Engine]) -> None:
    engine = make(last_id, budget=Budget(4))
    groups = [group(5, 9, 5, 7), group(head=2), group(3, head=3), group(9, 8, head=1)]
    assert log_odds(engine.submit(groups)) == [[5, 9, 5, 7], [], [3], [9, 8]]


@pytest.mark.parametrize("seed", range(10))
def test_scores_are_aligned_whatever_the_packs(make: Callable[..., Engine], seed: int) -> None:
    chance = random.Random(seed)
    engine = make(
        last_id,
        budget=Budget(chance.randint(1, 12), chance.choice([None, 1, 8])),
    )
    contents = [
        (chance.randint(1, 4), [chance.randint(1, 30) for _ in range(chance.randint(0, 20))])
        for _ in range(8)
    ]
    groups = [group(*documents, head=head) for head, documents in contents]
    assert log_odds(engine.submit(groups)) == [documents for _, documents in contents]


def test_duplicates_are_computed_once(make: Callable[..., Engine], gate: Gate) -> None:
    gate.open.set()
    scores = make(gate).submit([group(5, 5, 6), group(6, 5)]).result(TIMEOUT_S)
    assert [row.tolist() for row in scores.log_odds] == [[5, 5, 6], [6, 5]]
    assert gate.forwards == [[5, 6]]
    assert scores.tokens == 3  # one head and two documents


def test_tokens_count_the_head_of_each_pack(make: Callable[..., Engine]) -> None:
    engine = make(last_id, budget=Budget(3))
    assert engine.submit([group(5, 6, 7, 8, 9)]).result(TIMEOUT_S).tokens == 3 + 5


def test_progress_counts_distinct_documents(make: Callable[..., Engine]) -> None:
    steps: list[int] = []
    engine = make(last_id, budget=Budget(3))
    engine.submit([group(5, 6, 7, 8, 9, 9)], progress=steps.append).result(TIMEOUT_S)
    assert steps == [2, 2, 1]


def test_waiting_requests_share_a_pack_in_the_order_they_came(
    gate: Gate, gated: tuple[Engine, ScoresFuture]
) -> None:
    engine, _ = gated
    futures = [engine.submit([group(i, head=i)]) for i in (3, 1, 2)]
    gate.open.set()
    assert [log_odds(future) for future in futures] == [[[3]], [[1]], [[2]]]
    assert gate.forwards == [[100], [3, 1, 2]]


def test_long_job_neither_delays_a_short_call_nor_is_starved(
    gate: Gate, make: Callable[..., Engine]
) -> None:
    engine = make(gate, budget=Budget(6))
    job = engine.submit([group(*range(1000, 1100))])
    assert gate.started.wait(TIMEOUT_S)
    short = [engine.submit([group(i, i + 1, head=9)]) for i in (1, 3, 5)]
    gate.open.set()
    assert [log_odds(future) for future in short] == [[[1, 2]], [[3, 4]], [[5, 6]]]
    assert log_odds(job) == [list(range(1000, 1100))]
    first = [next(n for n, ids in enumerate(gate.forwards) if i in ids) for i in (1, 3, 5)]
    assert first == [1, 1, 2], "each in the first pack that has room"
    served = [sum(i >= 1000 for i in ids) for ids in gate.forwards]
    assert served[3:] == [5] * (len(served) - 4) + [served[-1]]


def test_stream_of_short_calls_leaves_a_long_job_its_share(make: Callable[..., Engine]) -> None:
    forwards: list[list[int]] = []
    enough = threading.Event()

    def call() -> None:
        with contextlib.suppress(ClosedError):
            engine.submit([group(*range(5))])

    def score(pack: Pack) -> NDArray[np.float32]:
        forwards.append(last_ids(pack))
        if not enough.is_set():  # as soon as one short call is served, another waits
            threading.Thread(target=call).start()
            time.sleep(0.002)
        return last_id(pack)

    engine = make(score, budget=Budget(6))
    job = engine.submit([group(*range(1000, 1100))])
    try:
        assert log_odds(job) == [list(range(1000, 1100))]
    finally:
        enough.set()
    assert any(0 in ids for ids in forwards), "the stream itself must be there"


def test_short_calls_and_long_jobs_that_come_together_hold_up_neither(
    make: Callable[..., Engine],
) -> None:
    forwards: list[list[int]] = []
    begin = threading.Event()

    def score(pack: Pack) -> NDArray[np.float32]:
        assert begin.wait(TIMEOUT_S)
        forwards.append(last_ids(pack))
        number = len(forwards)
        if number <= 40:  # one that comes during each forward, before the next is composed
            caller = threading.Thread(target=lambda: engine.submit([group(number, head=99)]))
            caller.start()
            caller.join(TIMEOUT_S)
        return last_id(pack)

    engine = make(score, budget=Budget(20, max_cached_tokens=8))
    starts = range(1000, 9000, 1000)
    jobs = [engine.submit([group(*range(i, i + 100), head=i)]) for i in starts]
    begin.set()
    for job in jobs:
        job.result(TIMEOUT_S)
    for number in range(1, 41):
        assert number in forwards[number], "each short call is in the next pack"
    seen = [[i // 1000 for i in ids if i >= 1000] for ids in forwards]
    first = [next(n for n, ids in enumerate(seen) if job in ids) for job in range(1, 9)]
    assert max(first) <= 16, "short calls that never end keep no job from its first pack"


def test_one_forward_is_in_flight_with_fifty_callers(make: Callable[..., Engine]) -> None:
    score, barrier = Peak(), threading.Barrier(50)
    engine = make(score)

    def call(i: int) -> list[list[float]]:
        barrier.wait(TIMEOUT_S)
        return log_odds(engine.submit([group(i, i + 1)]))

    with ThreadPoolExecutor(50) as threads:
        assert list(threads.map(call, range(50))) == [[[i, i + 1]] for i in range(50)]
    assert score.peak == 1
    assert score.calls < 50, "callers that wait share packs"


def test_control_without_an_engine_forwards_overlap() -> None:
    score, barrier = Peak(), threading.Barrier(50)
    pack = Pack(np.zeros(1, np.int64), np.zeros(1, np.int64), (), "fake")

    def call(i: int) -> None:
        barrier.wait(TIMEOUT_S)
        score(pack)

    with ThreadPoolExecutor(50) as threads:
        list(threads.map(call, range(50)))
    assert score.peak > 1


def test_full_queue_is_refused_at_once(gate: Gate, gated: tuple[Engine, ScoresFuture]) -> None:
    engine, first = gated
    waiting = [engine.submit([group(i)]) for i in (1, 2, 3)]
    with pytest.raises(OverloadedError, match="3 calls wait already"):
        engine.submit([group(4)])
    assert not gate.open.is_set()  # the refusal waited for nothing
    gate.open.set()
    assert [log_odds(future) for future in (first, *waiting)] == [[[100]], [[1]], [[2]], [[3]]]
    assert log_odds(engine.submit([group(5)])) == [[5]]


def test_full_queue_is_refused_before_anything_is_encoded(
    gate: Gate, gated: tuple[Engine, ScoresFuture]
) -> None:
    engine, _ = gated
    begun, go = threading.Event(), threading.Event()

    def work() -> Steps[str]:
        begun.set()
        assert go.wait(TIMEOUT_S)
        yield 1
        return "encoded"

    def never() -> Steps[None]:
        pytest.fail("a refused call was encoded")
        yield 1

    encoding = [engine.encode(work()) for _ in range(3)]
    assert begun.wait(TIMEOUT_S)
    with pytest.raises(OverloadedError, match="3 calls wait already"):
        engine.encode(never())
    go.set()
    assert [future.result(TIMEOUT_S) for future in encoding] == ["encoded"] * 3
    scoring = [engine.submit([group(i)]) for i in (1, 2, 3)]
    with pytest.raises(OverloadedError, match="3 calls wait already"):
        engine.encode(never())
    gate.open.set()
    assert [log_odds(future) for future in scoring] == [[[1]], [[2]], [[3]]]


def test_cancelled_waiting_request_is_never_scored(
    gate: Gate, gated: tuple[Engine, ScoresFuture]
) -> None:
    engine, _ = gated
    kept, dropped, last = (engine.submit([group(i)]) for i in (1, 2, 3))
    dropped.abandon()
    gate.open.set()
    assert (log_odds(kept), log_odds(last)) == ([[1]], [[3]])
    assert gate.forwards == [[100], [1, 3]]


def test_observers_are_told_of_each_pack(make: Callable[..., Engine], gate: Gate) -> None:
    engine, records = make(gate, budget=Budget(6)), []

    def raising(error: BaseException) -> Callable[[PackRecord], object]:
        def observe(record: PackRecord) -> None:
            raise error

        return observe

    for error in (RuntimeError("observer"), SystemExit(), KeyboardInterrupt()):
        engine.observe(raising(error))
    engine.observe(records.append)
    first = engine.submit([group(1, 2, 3)])
    assert gate.started.wait(TIMEOUT_S)
    others = [engine.submit([group(i, head=i)]) for i in (4, 5)]
    time.sleep(0.05)
    gate.open.set()
    for future in (first, *others):
        future.result(TIMEOUT_S)
    engine.close()
    assert [(r.requests, r.documents, r.tokens, r.waiting) for r in records] == [
        (1, 3, 4, 1), (2, 2, 4, 2),
    ]  # fmt: skip
    assert records[1].wait_s >= 0.05
    assert records[0].run_s >= 0.05 > records[1].run_s >= 0


def test_call_from_the_owner_thread_is_refused(make: Callable[..., Engine]) -> None:
    def call(count: int) -> None:
        engine.submit([group(1)])

    engine = make(last_id)
    with pytest.raises(ReentryError, match="would wait for itself"):
        engine.submit([group(1)], progress=call).result(TIMEOUT_S)
    assert log_odds(engine.submit([group(2)])) == [[2]]


def test_one_document_per_pack_when_asked(make: Callable[..., Engine], gate: Gate) -> None:
    gate.open.set()
    engine = make(gate, budget=Budget(100, max_documents=1))
    futures = [engine.submit([group(1, 2, 1)]), engine.submit([group(3)])]
    assert [log_odds(future) for future in futures] == [[[1, 2, 1]], [[3]]]
    assert sorted(gate.forwards) == [[1], [2], [3]]


def test_served_requests_are_forgotten(make: Callable[..., Engine]) -> None:
    engine = make(last_id)
    request = group(5)
    ids = weakref.ref(request.documents[0])
    engine.submit([request]).result(TIMEOUT_S)
    del request
    engine.submit([group(6)]).result(TIMEOUT_S)  # the owner has gone on
    assert ids() is None


def test_abandoned_request_stops_after_the_forward_in_flight(
    gate: Gate, make: Callable[..., Engine]
) -> None:
    engine = make(gate, budget=Budget(2))  # one document per pack
    future = engine.submit([group(*range(1, 9))])
    assert gate.started.wait(TIMEOUT_S)
    future.abandon()
    gate.open.set()
    with pytest.raises(CancelledError):
        future.result(TIMEOUT_S)
    assert log_odds(engine.submit([group(5)])) == [[5]]
    assert len(gate.forwards) == 2  # the one in flight, and the next caller's


def test_forked_process_is_told_at_once(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(last_id)
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(ClosedError, match="Load no model before the fork"):
        engine.submit([group(1)])
    with pytest.raises(ClosedError, match="Load no model before the fork"):
        Runtime(model="another").load()

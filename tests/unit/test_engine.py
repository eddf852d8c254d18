from __future__ import annotations

import contextlib
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_reranker import (
    ClosedError,
    DocumentTooLargeError,
    NonFiniteScoreError,
    OverloadedError,
    Qwen3RerankerError,
    ReentryError,
    faults,
    request,
)
from qwen3_reranker import engine as engine_module
from qwen3_reranker.engine import Engine, PackRecord
from qwen3_reranker.packing import Budget, Pack
from qwen3_reranker.request import Scores
from qwen3_reranker.runtime import Runtime
from qwen3_reranker.tokenization import EncodedGroup

Score = Callable[[Pack], NDArray[np.float32]]
TIMEOUT_S = 10


def group(*documents: int, head: int = 1) -> EncodedGroup:
    """Return documents of one token each; a document's score will be that token."""
    ids = [np.array([document], np.int32) for document in documents]
    return EncodedGroup(np.array([head], np.int32), ids, [False] * len(ids), 0)


def run_process(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def last_ids(pack: Pack) -> list[int]:
    return [int(pack.token_ids[i]) for i in pack.last_tokens]


def last_id(pack: Pack) -> NDArray[np.float32]:
    return np.array(last_ids(pack), np.float32)


def log_odds(future: Future[Scores]) -> list[list[float]]:
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
def gated(gate: Gate, make: Callable[..., Engine]) -> tuple[Engine, Future[Scores]]:
    """Return an engine whose first request, of document 100, is held in its forward."""
    engine = make(gate, max_waiting=3)
    first = engine.submit([group(100)])
    assert gate.started.wait(TIMEOUT_S)
    return engine, first


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
    gate: Gate, gated: tuple[Engine, Future[Scores]]
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


def test_full_queue_is_refused_at_once(gate: Gate, gated: tuple[Engine, Future[Scores]]) -> None:
    engine, first = gated
    waiting = [engine.submit([group(i)]) for i in (1, 2, 3)]
    with pytest.raises(OverloadedError, match="3 calls wait already"):
        engine.submit([group(4)])
    assert not gate.open.is_set()  # the refusal waited for nothing
    gate.open.set()
    assert [log_odds(future) for future in (first, *waiting)] == [[[100]], [[1]], [[2]], [[3]]]
    assert log_odds(engine.submit([group(5)])) == [[5]]


def test_cancelled_waiting_request_is_never_scored(
    gate: Gate, gated: tuple[Engine, Future[Scores]]
) -> None:
    engine, _ = gated
    kept, dropped, last = (engine.submit([group(i)]) for i in (1, 2, 3))
    assert dropped.cancel()
    gate.open.set()
    assert (log_odds(kept), log_odds(last)) == ([[1]], [[3]])
    assert gate.forwards == [[100], [1, 3]]


def test_running_request_cannot_be_cancelled(
    gate: Gate, gated: tuple[Engine, Future[Scores]]
) -> None:
    _, running = gated
    assert not running.cancel()
    gate.open.set()
    assert log_odds(running) == [[100]]


class Failing:
    """Scores by the last id; the k-th call raises."""

    def __init__(self, k: int, error: type[BaseException], *, times: int = 1) -> None:
        self.k, self.error, self.times = k, error, times
        self.calls = 0

    def __call__(self, pack: Pack) -> NDArray[np.float32]:
        self.calls += 1
        if self.k <= self.calls < self.k + self.times:
            raise self.error(f"forward {self.calls}")
        return last_id(pack)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_error_in_the_kth_forward_fails_one_caller_or_none(
    make: Callable[..., Engine], error: type[BaseException]
) -> None:
    requests = [[group(1, 2, 3, 4, 5)], [group(6, 7, head=2)], [group(8, head=3), group(9, head=4)]]
    expected = [[[1, 2, 3, 4, 5]], [[6, 7]], [[8], [9]]]
    k, failed = 0, 0
    while True:
        k += 1
        score = Failing(k, error)
        engine = make(score, budget=Budget(6))
        futures = [engine.submit(groups) for groups in requests]
        outcomes = [future.exception(TIMEOUT_S) for future in futures]
        for future, outcome, wanted in zip(futures, outcomes, expected, strict=True):
            if outcome is None:
                assert log_odds(future) == wanted
            else:
                assert (type(outcome), str(outcome)) == (error, f"forward {k}")
        assert sum(outcome is not None for outcome in outcomes) <= 1
        failed += any(outcome is not None for outcome in outcomes)
        if k > score.calls:  # a run that nothing touched
            break
        for groups, wanted in zip(requests, expected, strict=True):  # usable at once
            assert log_odds(engine.submit(groups)) == wanted
    assert failed


def test_bad_document_fails_its_own_caller_alone(make: Callable[..., Engine], gate: Gate) -> None:
    def score(pack: Pack) -> NDArray[np.float32]:
        if 66 in last_ids(pack):
            raise ValueError("66")
        return gate(pack)

    engine = make(score)
    held = engine.submit([group(100)])
    assert gate.started.wait(TIMEOUT_S)
    good, bad, other = (engine.submit([group(i, head=i)]) for i in (1, 66, 2))
    gate.open.set()
    with pytest.raises(ValueError, match="66"):
        bad.result(TIMEOUT_S)
    assert [log_odds(future) for future in (held, good, other)] == [[[100]], [[1]], [[2]]]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_memory_that_runs_out_in_the_kth_forward_loses_nothing(
    make: Callable[..., Engine], times: int
) -> None:
    documents = list(range(1, 30))
    k = 0
    while True:
        k += 1
        score = Failing(k, MemoryError, times=times)
        engine = make(score, budget=Budget(12))
        futures = [engine.submit([group(*documents, head=h)]) for h in (1, 2)]
        for future in futures:
            error = future.exception(TIMEOUT_S)
            if times < 3:  # three in a row reach a document that is alone
                assert error is None
            assert isinstance(error, DocumentTooLargeError) or log_odds(future) == [documents]
        if k > score.calls:
            break
    assert k > 6


def test_memory_bound_is_remembered(make: Callable[..., Engine]) -> None:
    sizes: list[int] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        sizes.append(len(pack.token_ids))
        if len(pack.token_ids) > 7:
            raise MemoryError
        return last_id(pack)

    engine = make(score, budget=Budget(24))
    assert log_odds(engine.submit([group(*range(1, 60))])) == [list(range(1, 60))]
    del sizes[:]
    assert log_odds(engine.submit([group(*range(1, 60))])) == [list(range(1, 60))]
    assert max(sizes) <= 7, "no pack is tried that cannot fit"


def test_pack_beyond_the_budget_that_does_not_fit_leaves_the_budget_alone(
    make: Callable[..., Engine],
) -> None:
    def score(pack: Pack) -> NDArray[np.float32]:
        if len(pack.token_ids) == 24:
            raise MemoryError
        sizes.append(len(pack.token_ids))
        return last_id(pack)

    # A head of 20 makes packs of up to 40 tokens; half of 24 is still above the budget of 10.
    sizes: list[int] = []
    long_head = EncodedGroup(
        np.arange(20, dtype=np.int32), [np.array([d], np.int32) for d in range(4)], [False] * 4, 0
    )
    engine = make(score, budget=Budget(10, max_attention_tokens=100))
    assert log_odds(engine.submit([long_head])) == [[0, 1, 2, 3]]
    assert sizes == [22, 22]
    assert log_odds(engine.submit([group(*range(9))])) == [list(range(9))]
    assert sizes[2:] == [10], "as many as before"


def test_document_that_never_fits_is_named_and_others_are_scored(
    make: Callable[..., Engine], gate: Gate
) -> None:
    def score(pack: Pack) -> NDArray[np.float32]:
        if 66 in last_ids(pack):
            raise MemoryError
        return gate(pack)

    engine = make(score)
    held = engine.submit([group(100)])
    assert gate.started.wait(TIMEOUT_S)
    bad = engine.submit([group(1, 2, 1, 66, 3)])
    worse = engine.submit([group(5, head=2), group(7, 66, head=3)])
    good = engine.submit([group(4, 5)])
    gate.open.set()
    with pytest.raises(DocumentTooLargeError, match=r"^documents\[3\] does not fit .* \(2 tokens"):
        bad.result(TIMEOUT_S)
    with pytest.raises(DocumentTooLargeError, match=r"^documents\[1\]\[1\] does not fit"):
        worse.result(TIMEOUT_S)
    assert (log_odds(held), log_odds(good)) == ([[100]], [[4, 5]])


def test_failed_try_leaves_nothing_in_memory(make: Callable[..., Engine]) -> None:
    class Tensor:
        """Stands for what a forward allocates."""

    left: list[weakref.ref[Tensor]] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        assert all(tensor() is None for tensor in left), "kept while the halves are scored"
        tensor = Tensor()
        left.append(weakref.ref(tensor))
        if len(left) == 1:
            raise MemoryError
        return last_id(pack)

    gc.disable()
    try:
        assert log_odds(make(score).submit([group(1, 2, 3)])) == [[1, 2, 3]]
    finally:
        gc.enable()
    assert len(left) == 3


def test_scores_that_are_not_finite_are_computed_again_once(make: Callable[..., Engine]) -> None:
    again: list[list[int]] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        ids = last_id(pack)
        return np.where(ids > 60, np.float32(np.inf), ids)

    def rescore(pack: Pack) -> NDArray[np.float32]:
        again.append(last_ids(pack))
        ids = last_id(pack)
        return np.where(ids > 70, np.float32(np.nan), ids)

    engine = make(score, rescore=rescore)
    assert log_odds(engine.submit([group(1, 66, 2), group(67, head=2)])) == [[1, 66, 2], [67]]
    assert again == [[66, 67]]
    with pytest.raises(NonFiniteScoreError, match=r"for 1 documents, .* documents\[1\], in"):
        engine.submit([group(1, 77, 66)]).result(TIMEOUT_S)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_second_try_that_fails_names_the_documents(
    make: Callable[..., Engine], error: type[BaseException]
) -> None:
    def score(pack: Pack) -> NDArray[np.float32]:
        ids = last_id(pack)
        return np.where(ids > 60, np.float32(np.inf), ids)

    def rescore(pack: Pack) -> NDArray[np.float32]:
        raise error("no room for float32")

    engine = make(score, rescore=rescore)
    with pytest.raises(NonFiniteScoreError, match=r"the first is documents\[1\], in"):
        engine.submit([group(1, 66)]).result(TIMEOUT_S)
    assert log_odds(engine.submit([group(1, 2)])) == [[1, 2]]


def test_observers_are_told_of_each_pack(make: Callable[..., Engine], gate: Gate) -> None:
    engine, records = make(gate, budget=Budget(6)), []

    def broken(record: PackRecord) -> None:
        raise RuntimeError("observer")

    engine.observe(broken)
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


@pytest.mark.parametrize(
    ("module", "name"), [(request, "merge_duplicates"), (faults, "build_pack")]
)
def test_fault_outside_the_model_leaves_nobody_waiting(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    real, calls = getattr(module, name), []

    def fail_once(*args: Any, **settings: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise MemoryError("no room to plan")
        return real(*args, **settings)

    engine = make(last_id)
    monkeypatch.setattr(module, name, fail_once)
    with pytest.raises(MemoryError, match="no room to plan"):
        engine.submit([group(1)]).result(TIMEOUT_S)
    assert log_odds(engine.submit([group(2)])) == [[2]]


def test_one_document_per_pack_when_asked(make: Callable[..., Engine], gate: Gate) -> None:
    gate.open.set()
    engine = make(gate, budget=Budget(100, max_documents=1))
    futures = [engine.submit([group(1, 2, 1)]), engine.submit([group(3)])]
    assert [log_odds(future) for future in futures] == [[[1, 2, 1]], [[3]]]
    assert sorted(gate.forwards) == [[1], [2], [3]]


def test_error_in_progress_reaches_its_caller_alone(make: Callable[..., Engine]) -> None:
    def fail(count: int) -> None:
        raise OSError(f"no terminal for {count}")

    engine = make(last_id)
    with pytest.raises(OSError, match="no terminal for 2"):
        engine.submit([group(1, 2)], progress=fail).result(TIMEOUT_S)
    assert log_odds(engine.submit([group(3)])) == [[3]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("groups", "count", "first"),
    [
        ([group(1, 66, 3)], 1, r"documents\[1\], in"),
        ([group(1, 66, 3, 66)], 2, r"documents\[1\], in"),
        ([group(1), group(2, 3, 66, head=2)], 1, r"documents\[1\]\[2\], in"),
        ([group(66), group(66, 66, head=2)], 3, r"documents\[0\]\[0\], in"),
    ],
)
def test_non_finite_scores_are_refused_by_index(
    make: Callable[..., Engine],
    groups: list[EncodedGroup],
    count: int,
    first: str,
    value: float,
) -> None:
    def score(pack: Pack) -> NDArray[np.float32]:
        ids = last_id(pack)
        return np.where(ids == 66, np.float32(value), ids)

    engine = make(score)
    with pytest.raises(NonFiniteScoreError, match=rf"for {count} documents, the first is {first}"):
        engine.submit(groups).result(TIMEOUT_S)
    assert log_odds(engine.submit([group(1, 2)])) == [[1, 2]]


def close_in_thread(engine: Engine) -> threading.Thread:
    thread = threading.Thread(target=engine.close)
    thread.start()
    return thread


def test_close_fails_waiting_requests_and_finishes_the_forward_in_flight(
    gate: Gate, gated: tuple[Engine, Future[Scores]]
) -> None:
    engine, running = gated
    waiting = [engine.submit([group(i)]) for i in (1, 2, 3)]
    closing = close_in_thread(engine)
    for future in waiting:
        with pytest.raises(ClosedError, match="closed while this call waited"):
            future.result(TIMEOUT_S)
    gate.open.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert log_odds(running) == [[100]]
    assert gate.forwards == [[100]]


def test_close_passes_over_cancelled_requests(
    gate: Gate, gated: tuple[Engine, Future[Scores]]
) -> None:
    engine, _ = gated
    dropped, kept = engine.submit([group(1)]), engine.submit([group(2)])
    dropped.cancel()
    closing = close_in_thread(engine)
    with pytest.raises(ClosedError, match="closed while this call waited"):
        kept.result(TIMEOUT_S)
    gate.open.set()
    closing.join(TIMEOUT_S)
    assert dropped.cancelled()


def test_close_stops_a_request_between_its_packs(gate: Gate, make: Callable[..., Engine]) -> None:
    engine = make(gate, budget=Budget(2))
    running = engine.submit([group(1, 2, 3)])
    assert gate.started.wait(TIMEOUT_S)
    waiting = engine.submit([group(4)])
    closing = close_in_thread(engine)
    with pytest.raises(ClosedError, match="closed while this call waited"):
        waiting.result(TIMEOUT_S)  # from here on the engine is closed
    gate.open.set()
    with pytest.raises(ClosedError, match="closed while this call was scored"):
        running.result(TIMEOUT_S)
    closing.join(TIMEOUT_S)
    assert gate.forwards == [[1]]


def test_close_ends_the_thread_and_is_idempotent(make: Callable[..., Engine]) -> None:
    others = set(threading.enumerate())
    engine = make(last_id)
    assert log_odds(engine.submit([group(1)])) == [[1]]
    (owner,) = set(threading.enumerate()) - others
    assert (owner.name, owner.daemon) == ("qwen3-reranker", True)
    engine.close()
    engine.close()
    assert not owner.is_alive()


def test_submit_after_close_is_refused(make: Callable[..., Engine]) -> None:
    engine = make(last_id)
    engine.close()
    with pytest.raises(ClosedError, match=r"the reranker is closed\. Make a new one"):
        engine.submit([group(1)])


def test_close_from_the_owner_thread_does_not_wait_for_itself(
    make: Callable[..., Engine],
) -> None:
    closed = threading.Event()

    def close(pack: Pack) -> NDArray[np.float32]:
        engine.close()
        closed.set()
        return last_id(pack)

    engine = make(close)
    assert log_odds(engine.submit([group(1)])) == [[1]]
    assert closed.is_set()
    with pytest.raises(ClosedError, match="is closed"):
        engine.submit([group(2)])


def test_exit_stops_every_engine_and_waits_for_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "_engines", weakref.WeakSet[Engine]())
        patch.setattr(engine_module, "_owners", weakref.WeakSet[threading.Thread]())
        engine = Engine(last_id, backend="fake", budget=Budget(100))
        (owner,) = engine_module._owners
        assert owner.is_alive()
        engine_module._await_owners()
        assert not owner.is_alive()
    with pytest.raises(ClosedError):
        engine.submit([group(1)])


def test_interrupt_while_the_exit_waits_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stubborn:
        def join(self) -> None:
            raise KeyboardInterrupt

    codes: list[int] = []
    monkeypatch.setattr(engine_module, "_engines", set[Engine]())
    monkeypatch.setattr(engine_module, "_owners", {Stubborn()})
    monkeypatch.setattr("os._exit", codes.append)
    print("said before")
    engine_module._await_owners()
    assert codes == [130]
    assert capsys.readouterr().out == "said before\n"


EXIT_WITH_QUEUED_WORK = """
import sys, threading, time, types
import numpy as np
from qwen3_reranker.packing import Budget
from qwen3_reranker.runtime import Runtime
from qwen3_reranker.tokenization import EncodedGroup

started = threading.Event()

class Network:
    def score(self, pack):
        started.set()
        time.sleep(0.5)
        return np.zeros(len(pack.last_tokens), np.float32)

    rescore = score

model = types.SimpleNamespace(
    network=Network(), backend="fake", budget=Budget(100)
)
sys.modules["qwen3_reranker.loading"] = types.SimpleNamespace(load_model=lambda **settings: model)
runtime = Runtime(model="model")
_, engine = runtime.load()
ids = np.array([1], np.int32)
futures = [engine.submit([EncodedGroup(ids, [ids], [False], 0)]) for _ in range(200)]
futures[-1].add_done_callback(lambda future: print(type(future.exception()).__name__, flush=True))
started.wait()
print("leaving", flush=True)
"""


def test_process_with_queued_work_exits() -> None:
    start = time.monotonic()
    done = run_process(EXIT_WITH_QUEUED_WORK)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["leaving", "ClosedError"]
    assert time.monotonic() - start < 10  # the queue alone would take 100 s


EXIT_BEFORE_WEIGHTS_ARE_FREED = """
import time
import numpy as np
from qwen3_reranker.engine import Engine
from qwen3_reranker.packing import Budget
from qwen3_reranker.tokenization import EncodedGroup

class Weights:
    def score(self, pack):
        return np.zeros(len(pack.last_tokens), np.float32)
    def __del__(self):
        time.sleep(0.5)  # torch, too, lets other threads run while it frees
        print("freed", flush=True)

engine = Engine(Weights().score, backend="documents", budget=Budget(100))
ids = np.array([1], np.int32)
engine.submit([EncodedGroup(ids, [ids], [False], 0)]).result(10)
engine.stop()
del engine
"""


def test_process_waits_for_an_owner_that_frees_the_weights() -> None:
    # Otherwise the interpreter ends the owner inside torch, which aborts the process.
    done = run_process(EXIT_BEFORE_WEIGHTS_ARE_FREED)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "freed\n")


INTERRUPTED_AT_EXIT = """
import os, signal, threading, time
import numpy as np
from qwen3_reranker.engine import Engine
from qwen3_reranker.packing import Budget
from qwen3_reranker.tokenization import EncodedGroup

# A shell's background job, whose children this may be, ignores interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
started = threading.Event()

def score(pack):
    started.set()
    time.sleep(30)

engine = Engine(score, backend="documents", budget=Budget(100))
ids = np.array([1], np.int32)
engine.submit([EncodedGroup(ids, [ids], [False], 0)])
started.wait()
interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
interrupt.daemon = True  # the exit does not wait for it
interrupt.start()
print("leaving")
"""


def test_interrupt_ends_a_process_that_waits_for_a_forward() -> None:
    start = time.monotonic()
    done = run_process(INTERRUPTED_AT_EXIT)
    assert (done.returncode, done.stdout) == (130, "leaving\n")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("wrong", [1, 2, 4])
def test_wrong_number_of_scores_is_never_spread_or_cut(
    make: Callable[..., Engine], wrong: int
) -> None:
    engine = make(lambda pack: np.full(wrong, 7, np.float32))
    with pytest.raises(Qwen3RerankerError, match=rf"shape \({wrong},\) for 3 documents"):
        engine.submit([group(1, 2, 3)]).result(TIMEOUT_S)


def test_close_while_the_owner_takes_the_last_request(make: Callable[..., Engine]) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            engine = make(last_id)
            futures = [engine.submit([group(i)]) for i in range(2)]
            engine.close()
            for future in futures:  # each is answered, by its score or by an error
                assert isinstance(future.exception(TIMEOUT_S), ClosedError | type(None))
    finally:
        sys.setswitchinterval(interval)


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


def test_failed_request_leaves_no_cycle(make: Callable[..., Engine]) -> None:
    def fail(pack: Pack) -> NDArray[np.float32]:
        raise ValueError("first forward")

    engine = make(fail)
    request = group(5)
    ids = weakref.ref(request.documents[0])
    gc.disable()
    try:
        with pytest.raises(ValueError, match="first forward"):
            engine.submit([request]).result(TIMEOUT_S)
        del request
        with pytest.raises(ValueError, match="first forward"):
            engine.submit([group(6)]).result(TIMEOUT_S)
        assert ids() is None
    finally:
        gc.enable()


def test_forked_process_is_told_at_once(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(last_id)
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(ClosedError, match="Load no model before the fork"):
        engine.submit([group(1)])
    with pytest.raises(ClosedError, match="Load no model before the fork"):
        Runtime(model="another").load()


def test_known_prompts_are_not_scored_again() -> None:
    seen: list[int] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        seen.extend(last_ids(pack))
        return last_id(pack)

    engine = Engine(score, backend="documents", budget=Budget(100), max_cached_scores=3)
    progress: list[int] = []
    assert log_odds(engine.submit([group(5, 7), group(5, head=2)])) == [[5.0, 7.0], [5.0]]
    again = engine.submit([group(9, 5, 7, 5)], progress=progress.append)
    assert log_odds(again) == [[9.0, 5.0, 7.0, 5.0]]
    assert seen == [5, 7, 5, 9]
    assert sum(progress) == 3, "distinct documents, known or not"
    assert log_odds(engine.submit([group(5, head=2)])) == [[5.0]]
    assert seen == [5, 7, 5, 9, 5], "the bound is three: the oldest went"
    engine.close()


def test_without_being_asked_nothing_is_kept() -> None:
    seen: list[int] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        seen.extend(last_ids(pack))
        return last_id(pack)

    engine = Engine(score, backend="documents", budget=Budget(100))
    for _ in range(2):
        assert log_odds(engine.submit([group(5)])) == [[5.0]]
    assert seen == [5, 5]
    engine.close()


def test_score_that_is_not_finite_is_not_kept() -> None:
    values = iter([np.nan, 1.0])
    engine = Engine(
        lambda pack: np.array([next(values)], np.float32),
        backend="documents", budget=Budget(100), max_cached_scores=3,
    )  # fmt: skip
    with pytest.raises(NonFiniteScoreError):
        engine.submit([group(5)]).result(TIMEOUT_S)
    assert log_odds(engine.submit([group(5)])) == [[1.0]]
    engine.close()

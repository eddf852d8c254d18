"""An engine that ends, and a process that ends with one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_reranker import ClosedError
from qwen3_reranker.engine import threads as owners
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget, Pack
from qwen3_reranker.engine.request import ScoresFuture
from tests.engines import TIMEOUT_S, Gate, group, last_id, log_odds


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


def close_in_thread(engine: Engine) -> threading.Thread:
    thread = threading.Thread(target=engine.close)
    thread.start()
    return thread


def test_close_fails_waiting_requests_and_finishes_the_forward_in_flight(
    gate: Gate, gated: tuple[Engine, ScoresFuture]
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


def test_request_that_comes_while_the_engine_closes_is_not_begun(
    gate: Gate, gated: tuple[Engine, ScoresFuture]
) -> None:
    engine, running = gated
    waiting = engine.submit([group(1)])
    engine._is_closed = True  # as `stop` does first
    gate.open.set()
    with pytest.raises(ClosedError, match="closed while this call waited"):
        waiting.result(TIMEOUT_S)
    assert log_odds(running) == [[100]]
    assert gate.forwards == [[100]]


def test_close_passes_over_cancelled_requests(
    gate: Gate, gated: tuple[Engine, ScoresFuture]
) -> None:
    engine, _ = gated
    dropped, kept = engine.submit([group(1)]), engine.submit([group(2)])
    dropped.abandon()
    closing = close_in_thread(engine)
    with pytest.raises(ClosedError, match="closed while this call waited"):
        kept.result(TIMEOUT_S)
    gate.open.set()
    closing.join(TIMEOUT_S)
    assert gate.forwards == [[100]]


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
    started = set(threading.enumerate()) - others
    names = {"qwen3-reranker", "qwen3-reranker-encode"}
    assert {thread.name for thread in started} == names
    assert all(thread.daemon for thread in started)
    engine.close()
    engine.close()
    assert not any(thread.is_alive() for thread in started)


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
        patch.setattr(owners, "_owners", weakref.WeakSet[owners.Owner]())
        patch.setattr(owners, "_threads", weakref.WeakSet[threading.Thread]())
        engine = Engine(last_id, backend="fake", budget=Budget(100))
        threads = list(owners._threads)
        assert [thread.is_alive() for thread in threads] == [True, True]  # scores, encodes
        owners._await_threads()
        assert [thread.is_alive() for thread in threads] == [False, False]
    with pytest.raises(ClosedError):
        engine.submit([group(1)])


def test_interrupt_while_the_exit_waits_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stubborn:
        def join(self) -> None:
            raise KeyboardInterrupt

    codes: list[int] = []
    monkeypatch.setattr(owners, "_owners", set[owners.Owner]())
    monkeypatch.setattr(owners, "_threads", {Stubborn()})
    monkeypatch.setattr("os._exit", codes.append)
    print("said before")
    owners._await_threads()
    assert codes == [130]
    assert capsys.readouterr().out == "said before\n"


EXIT_WITH_QUEUED_WORK = """
import sys, threading, time, types
import numpy as np
from qwen3_reranker.engine.packing import Budget
from qwen3_reranker.runtime import Runtime
from qwen3_reranker.text.tokenizer import EncodedGroup

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
stub = types.SimpleNamespace(load_model=lambda **settings: model)
sys.modules["qwen3_reranker.model.loading"] = stub
runtime = Runtime(model="model")
_, engine = runtime.load()
ids = np.array([1], np.int32)
group = EncodedGroup(ids, [ids], [False], 0)
futures = [engine.submit([group]) for _ in range(199)]
ended = lambda: print(type(futures[-1].exception()).__name__, flush=True)
futures.append(engine.submit([group], on_done=ended))
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
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget
from qwen3_reranker.text.tokenizer import EncodedGroup

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
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget
from qwen3_reranker.text.tokenizer import EncodedGroup

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

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from qwen3_reranker import ClosedError
from qwen3_reranker.engine.turns import Turns
from qwen3_reranker.text.steps import Steps
from tests.engines import TIMEOUT_S


@pytest.fixture
def turns() -> Iterator[Turns]:
    turns = Turns()
    yield turns
    turns.stop()
    turns.thread.join()


class Log:
    """Work that writes down its steps; the first step of all waits to be let go."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.started, self.go = threading.Event(), threading.Event()

    def work(self, name: str, *costs: int) -> Steps[str]:
        for cost in costs:
            yield cost
            self.started.set()
            assert self.go.wait(TIMEOUT_S)
            self.steps.append(name)
        return name


def test_result_is_what_the_work_returns(turns: Turns) -> None:
    log = Log()
    log.go.set()
    assert turns.submit(log.work("a", 1, 1)).result(TIMEOUT_S) == "a"
    assert turns.submit(log.work("b")).result(TIMEOUT_S) == "b"
    assert log.steps == ["a", "a"]


def test_who_had_least_is_next_and_newcomers_are_first(turns: Turns) -> None:
    log = Log()
    long = turns.submit(log.work("long", *[10] * 6))
    assert log.started.wait(TIMEOUT_S)
    short = [turns.submit(log.work(name, 1)) for name in ("short", "shorter")]
    log.go.set()
    assert [future.result(TIMEOUT_S) for future in (*short, long)] == ["short", "shorter", "long"]
    assert log.steps[:4] == ["long", "shorter", "short", "long"]


def test_short_work_is_not_behind_long_work_that_has_just_come(turns: Turns) -> None:
    log = Log()
    long = [turns.submit(log.work(f"long {i}", 10, 10)) for i in range(8)]
    assert log.started.wait(TIMEOUT_S)
    short = turns.submit(log.work("short", 2))
    log.go.set()
    for future in (short, *long):
        future.result(TIMEOUT_S)
    assert log.steps.index("short") == 1


def test_stream_of_short_work_leaves_the_long_its_share(turns: Turns) -> None:
    log = Log()
    long = turns.submit(log.work("long", *[1] * 50))
    rival = turns.submit(log.work("rival", *[1] * 50))
    log.go.set()
    long.result(TIMEOUT_S)
    rival.result(TIMEOUT_S)
    halves = log.steps[:50].count("long")
    assert 20 <= halves <= 30


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit()])
def test_error_is_its_own_callers_alone(turns: Turns, error: BaseException) -> None:
    def failing() -> Steps[None]:
        yield 1
        raise error

    with pytest.raises(type(error)):
        turns.submit(failing()).result(TIMEOUT_S)
    log = Log()
    log.go.set()
    assert turns.submit(log.work("a", 1)).result(TIMEOUT_S) == "a"


def test_abandoned_work_goes_no_further(turns: Turns) -> None:
    log = Log()
    left = turns.submit(log.work("left", *[1] * 1000))
    assert log.started.wait(TIMEOUT_S)
    left.abandon()
    log.go.set()
    turns.submit(log.work("a", 1)).result(TIMEOUT_S)
    assert log.steps.count("left") <= 1


def test_abandoned_work_whose_turn_it_is_is_let_go_of(turns: Turns) -> None:
    log = Log()
    left = turns.submit(log.work("left", *[1] * 1000))
    assert log.started.wait(TIMEOUT_S)
    left.abandon()
    log.go.set()
    with pytest.raises(CancelledError):
        left.result(TIMEOUT_S)
    assert log.steps == ["left"]


def test_abandoned_work_is_let_go_of_before_its_turn(turns: Turns) -> None:
    log = Log()
    other = turns.submit(log.work("other", *[1] * 10**6))
    assert log.started.wait(TIMEOUT_S)
    left = turns.submit(log.work("left", 1, 10**9))
    log.go.set()
    while "left" not in log.steps:
        time.sleep(0.001)
    left.abandon()
    with pytest.raises(CancelledError):
        left.result(TIMEOUT_S)
    assert not other.done()
    other.abandon()


def test_stop_fails_what_waits_and_what_is_begun() -> None:
    turns, log = Turns(), Log()
    begun = turns.submit(log.work("begun", 1, 1))
    assert log.started.wait(TIMEOUT_S)
    waiting = turns.submit(log.work("waiting", 1))
    turns.stop()
    log.go.set()
    for future in (begun, waiting):
        with pytest.raises(ClosedError, match="closed while this call waited"):
            future.result(TIMEOUT_S)
    turns.thread.join(TIMEOUT_S)
    assert not turns.thread.is_alive()
    with pytest.raises(ClosedError, match="Make a new one"):
        turns.submit(log.work("late", 1))

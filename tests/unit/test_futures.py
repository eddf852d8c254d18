from __future__ import annotations

import threading

import pytest

from qwen3_reranker.call.futures import LockFreeFuture


def test_result_is_had_by_who_waits_and_again() -> None:
    future: LockFreeFuture[int] = LockFreeFuture()
    threading.Timer(0.01, future.set_result, [7]).start()
    assert future.result(10) == future.result() == 7
    assert future.done()


def test_error_is_raised() -> None:
    future: LockFreeFuture[int] = LockFreeFuture()
    future.set_exception(KeyError("k"))
    with pytest.raises(KeyError):
        future.result()
    assert isinstance(future.exception(), KeyError)


def test_no_result_in_time() -> None:
    with pytest.raises(TimeoutError):
        LockFreeFuture[int]().result(0.001)


def test_first_of_many_setters_wins() -> None:
    told = []
    future: LockFreeFuture[int] = LockFreeFuture(lambda: told.append(future.done()))
    assert future.set_result(1)
    assert not future.set_result(2)
    assert not future.set_exception(ValueError())
    assert future.result() == 1
    assert told == [True]

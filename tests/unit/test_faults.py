"""Forwards that fail: who is told, and who is not kept waiting."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_reranker import DocumentTooLargeError, NonFiniteScoreError, Qwen3RerankerError
from qwen3_reranker.engine import forwards, request
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget, Pack
from qwen3_reranker.text.tokenizer import EncodedGroup
from tests.engines import TIMEOUT_S, Gate, group, last_id, last_ids, log_odds


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


def test_budget_grows_again_when_memory_was_short_for_a_while(make: Callable[..., Engine]) -> None:
    sizes: list[int] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        sizes.append(len(pack.token_ids))
        if len(sizes) == 1:
            raise MemoryError
        return last_id(pack)

    engine = make(score, budget=Budget(24, max_attention_tokens=96))
    documents = list(range(1, 2000))
    assert log_odds(engine.submit([group(*documents)])) == [documents]
    assert sizes[0] == 24
    assert set(sizes[1:64]) <= {12, 13}
    assert sizes[65:-1] == [24] * len(sizes[65:-1]) != []


def test_budget_doubles_until_it_is_what_it_was(make: Callable[..., Engine]) -> None:
    sizes: list[int] = []

    def score(pack: Pack) -> NDArray[np.float32]:
        sizes.append(len(pack.token_ids))
        if len(sizes) <= 2:  # the pack, and its first half
            raise MemoryError
        return last_id(pack)

    engine = make(score, budget=Budget(24, max_attention_tokens=96))
    documents = list(range(1, 3000))
    assert log_odds(engine.submit([group(*documents)])) == [documents]
    largest = [max(sizes[start : start + 40]) for start in (10, 80, 160)]
    assert largest[0] < largest[1] < largest[2] == 24


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
    with pytest.raises(
        DocumentTooLargeError, match=r"^documents\[0\]\[3\] does not fit .* \(2 tokens"
    ):
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
    with pytest.raises(NonFiniteScoreError, match=r"for 1 documents, .* documents\[0\]\[1\], in"):
        engine.submit([group(1, 77, 66)]).result(TIMEOUT_S)


def test_second_try_that_does_not_fit_is_made_in_halves(make: Callable[..., Engine]) -> None:
    again: list[list[int]] = []

    def rescore(pack: Pack) -> NDArray[np.float32]:
        again.append(last_ids(pack))
        if len(pack.last_tokens) > 2:
            raise MemoryError
        return last_id(pack)

    engine = make(lambda pack: np.full(len(pack.last_tokens), np.nan, np.float32), rescore=rescore)
    assert log_odds(engine.submit([group(1, 2, 3), group(4, 5, head=2)])) == [[1, 2, 3], [4, 5]]
    assert again == [[1, 2, 3, 4, 5], [1, 2], [3, 4, 5], [3], [4, 5]]


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
    message = rf"documents\[0\]\[1\], and in float32 it failed with {error.__name__}\. Free memory"
    with pytest.raises(NonFiniteScoreError, match=message):
        engine.submit([group(1, 66)]).result(TIMEOUT_S)
    assert log_odds(engine.submit([group(1, 2)])) == [[1, 2]]


@pytest.mark.parametrize(
    ("module", "name"), [(request, "merge_duplicates"), (forwards, "build_pack")]
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
    groups = [group(1)]
    ids = weakref.ref(groups[0].documents[0])
    with pytest.raises(MemoryError, match="no room to plan"):
        engine.submit(groups).result(TIMEOUT_S)
    del groups
    assert log_odds(engine.submit([group(2)])) == [[2]]
    gc.collect()
    assert ids() is None, "an idle owner holds nothing of what failed"


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
        ([group(1, 66, 3)], 1, r"documents\[0\]\[1\], in"),
        ([group(1, 66, 3, 66)], 2, r"documents\[0\]\[1\], in"),
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


@pytest.mark.parametrize("wrong", [1, 2, 4])
def test_wrong_number_of_scores_is_never_spread_or_cut(
    make: Callable[..., Engine], wrong: int
) -> None:
    engine = make(lambda pack: np.full(wrong, 7, np.float32))
    with pytest.raises(Qwen3RerankerError, match=rf"shape \({wrong},\) for 3 documents"):
        engine.submit([group(1, 2, 3)]).result(TIMEOUT_S)


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

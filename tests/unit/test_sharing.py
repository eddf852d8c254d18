"""When a model is loaded, who shares it, and when it is freed."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qwen3_reranker import ClosedError, ModelLoadError, RankedDocument, Reranker
from qwen3_reranker.data.demo_corpus import read_sample
from qwen3_reranker.engine import threads as owners
from tests import fakes
from tests.fakes import FRUIT, QUERY, head_ids
from tests.invariants import check_ranking


def scoring_threads() -> set[threading.Thread]:
    """Return the threads of engines."""
    return {thread for thread in threading.enumerate() if thread.name == "qwen3-reranker"}


class Loads:
    """Stands for `load_model`: makes a new fake model and remembers the settings."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []

    def __call__(self, **settings: Any) -> fakes.FakeModel:
        self.settings.append(settings)
        return fakes.FakeModel()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    loads = Loads()
    fakes.replace_load_model(monkeypatch, loads)
    return loads


def test_process_forked_while_a_model_loads_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def load(**settings: Any) -> fakes.FakeModel:
        begun.set()
        assert may_end.wait(10)
        return fakes.FakeModel()

    fakes.replace_load_model(monkeypatch, load)
    monkeypatch.setattr(owners, "_loaded_in", set())
    reranker = Reranker("model")
    loading = threading.Thread(target=reranker.rank, args=(QUERY, FRUIT))
    loading.start()
    assert begun.wait(10)
    with monkeypatch.context() as child:
        child.setattr("os.getpid", lambda: -1)
        with pytest.raises(ClosedError, match="Load no model before the fork"):
            reranker.rank(QUERY, FRUIT)
    may_end.set()
    loading.join(10)
    check_ranking(reranker.rank(QUERY, FRUIT), FRUIT)


def test_model_is_loaded_once_by_the_first_call(loads: Loads) -> None:
    with Reranker("model", dtype="bfloat16", device="cpu", max_batch_tokens=512) as reranker:
        assert not loads.settings
        reranker.rank(QUERY, FRUIT)
        reranker.rank(QUERY, FRUIT)
        assert reranker.loaded is reranker.loaded
    assert loads.settings == [
        {
            "model": "model", "dtype": "bfloat16", "device": "cpu", "template": None,
            "adapter": None, "revision": None, "max_batch_tokens": 512, "exact": False,
            "read_sample": read_sample,
        }
    ]  # fmt: skip


def test_model_is_loaded_once_by_concurrent_first_calls(loads: Loads) -> None:
    barrier, reranker = threading.Barrier(8), Reranker("model")

    def call(i: int) -> list[RankedDocument]:
        barrier.wait(10)
        return reranker.rank(QUERY, FRUIT)

    with reranker, ThreadPoolExecutor(8) as threads:
        rankings = list(threads.map(call, range(8)))
    assert rankings == [rankings[0]] * 8
    assert len(loads.settings) == 1


def test_failed_load_is_tried_again_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Any] = [ModelLoadError("no such model"), fakes.FakeModel()]

    def load(**settings: Any) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    fakes.replace_load_model(monkeypatch, load)
    with Reranker("model") as reranker:
        with pytest.raises(ModelLoadError, match="no such model"):
            reranker.rank(QUERY, FRUIT)
        check_ranking(reranker.rank(QUERY, FRUIT), FRUIT)


@pytest.mark.parametrize(
    "settings", [{}, {"instruction": "Find law"}, {"max_length": 512}, {"dtype": None}]
)
def test_shared_equal_settings_share_one_model(loads: Loads, settings: dict[str, Any]) -> None:
    with Reranker.shared("model") as first, Reranker.shared("model", **settings) as second:
        assert first is not second
        assert first.loaded is second.loaded
        assert len(loads.settings) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "other"},
        {"dtype": "bfloat16"},
        {"device": "meta"},
        {"template": "chatml"},
        {"adapter": "lora"},
        {"revision": "main"},
        {"max_batch_tokens": 512},
        {"exact": True},
        {"max_cached_scores": 9},
    ],
)
def test_shared_other_settings_load_another_model(loads: Loads, settings: dict[str, Any]) -> None:
    with (
        Reranker.shared("model") as first,
        Reranker.shared(**{"model": "model", **settings}) as second,
    ):
        assert first.loaded is not second.loaded


def test_not_shared_rerankers_load_their_own(loads: Loads) -> None:
    with Reranker("model") as first, Reranker("model") as second, Reranker.shared("model") as third:
        assert len({id(first.loaded), id(second.loaded), id(third.loaded)}) == 3


def test_shared_keeps_instruction_and_usage_apart(loads: Loads) -> None:
    with (
        Reranker.shared("model", instruction="Find code") as first,
        Reranker.shared("model", instruction="Find law") as second,
    ):
        first.rank(QUERY, FRUIT)
        second.rank(QUERY, FRUIT[:1])
        network: Any = first.loaded.network
        assert network.heads == [head_ids("Find code", QUERY), head_ids("Find law", QUERY)]
        assert (first.usage.documents, second.usage.documents) == (5, 1)


def test_shared_model_is_freed_with_its_last_user(loads: Loads) -> None:
    others = scoring_threads()
    first, second = Reranker.shared("model"), Reranker.shared("model")
    first.rank(QUERY, FRUIT)
    model = weakref.ref(first.loaded)
    assert len(scoring_threads() - others) == 1
    first.close()
    gc.collect()
    assert model() is not None
    check_ranking(second.rank(QUERY, FRUIT), FRUIT)
    second.close()
    gc.collect()
    assert model() is None
    assert not scoring_threads() - others
    with Reranker.shared("model") as third:
        third.rank(QUERY, FRUIT)
    assert len(loads.settings) == 2


def test_model_is_freed_when_its_reranker_is_collected(loads: Loads) -> None:
    others = scoring_threads()
    reranker = Reranker("model")
    reranker.rank(QUERY, FRUIT)
    model = weakref.ref(reranker.loaded)
    del reranker
    gc.collect()
    assert model() is None
    assert not scoring_threads() - others


def test_copies_share_the_weights_and_count_for_themselves(loads: Loads) -> None:
    for make in (Reranker, Reranker.shared):
        before = len(loads.settings)
        reranker = make("a model", instruction="task", max_length=512)
        for twin in (copy.copy(reranker), copy.deepcopy(reranker)):
            twin.rank("tea", ["tea", "rain"])
            assert (twin.usage.documents, reranker.usage.documents) == (2, 0)
            assert repr(twin) == repr(reranker)
        assert len(loads.settings) == before + 1


def test_pickle_of_a_closed_reranker_is_refused() -> None:
    reranker = Reranker("a model")
    reranker.close()
    with pytest.raises(ClosedError):
        pickle.dumps(reranker)

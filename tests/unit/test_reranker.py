from __future__ import annotations

import asyncio
import copy
import io
import logging
import math
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_reranker import (
    Calibration,
    ClosedError,
    DocumentTooLargeError,
    InputError,
    NonFiniteScoreError,
    RankedDocument,
    Reranker,
    Scorer,
    Usage,
)
from qwen3_reranker.call.results import in_order
from qwen3_reranker.engine.packing import Budget, Pack
from tests import fakes
from tests.fakes import FRUIT, QUERY, head_ids
from tests.invariants import check_ranking

ORDER = [1, 2, 4, 0, 3]
HIGH, LOW = "\ud83d", "\ude00"  # halves of one emoji


@dataclass
class Network:
    """A network of one function."""

    score: Callable[[Pack], NDArray[np.float32]]


def sigmoid(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


def num_tokens(query: str, documents: list[str]) -> int:
    """Return the tokens of one head and of every document given."""
    group = fakes.small_tokenizer().encode_group(None, query, documents, max_length=8192)
    return len(group.head) + sum(map(len, group.documents))


def indices(ranking: list[RankedDocument]) -> list[int]:
    return [result.index for result in ranking]


def test_rank_puts_most_relevant_first(reranker: Reranker) -> None:
    ranking = reranker.rank(QUERY, FRUIT)
    check_ranking(ranking, FRUIT)
    assert indices(ranking) == ORDER
    assert [result.log_odds for result in ranking] == [0.5, -0.5, -0.5, -1.5, -1.5]
    assert ranking[0].score == pytest.approx(sigmoid(0.5))


def test_rank_equal_scores_keeps_input_order(reranker: Reranker) -> None:
    documents = [f"green pear {letter}" for letter in "ihgfedcb"]
    ranking = reranker.rank(QUERY, documents)
    check_ranking(ranking, documents)
    assert indices(ranking) == list(range(8))


def test_rank_duplicates_score_alike_and_are_computed_once(reranker: Reranker) -> None:
    documents = ["red pear", "plum", "red pear", "red pear", "plum"]
    ranking = reranker.rank(QUERY, documents)
    check_ranking(ranking, documents)
    assert indices(ranking) == [0, 2, 3, 1, 4]
    assert reranker.usage.tokens == num_tokens(QUERY, ["red pear", "plum"])
    assert reranker.usage.documents == 5


def test_rank_over_many_packs_equals_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    colours, fruits = ["red", "green", "blue"], ["apple", "pear", "plum", ""]
    documents = [f"{c} {f} {n}" for n in range(20) for c in colours for f in fruits]
    model = fakes.FakeModel(budget=Budget(200))
    with fakes.loaded(monkeypatch, model):
        reranker = Reranker("model")
        ranking = reranker.rank(QUERY, documents)
        assert len(model.network.packs) > 5
        check_ranking(ranking, documents)
        for result in ranking[::17]:
            assert reranker.score(QUERY, [result.document]) == [result.score]


class ForgetfulNetwork(fakes.FakeNetwork):
    """Keeps no pack, as a real network."""

    def score(self, pack: Pack) -> NDArray[np.float32]:
        log_odds = super().score(pack)
        self.packs.clear()
        return log_odds


def test_rank_thousands_of_documents_holds_no_pack_but_the_one_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = [f"{'red ' * (i % 100)}{i}" for i in range(3_000)]
    with fakes.loaded(monkeypatch, fakes.FakeModel(ForgetfulNetwork())):
        reranker = Reranker("model")
        reranker.rank(QUERY, FRUIT)
        tracemalloc.start()
        try:
            ranking = reranker.rank(QUERY, documents)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    check_ranking(ranking, documents)
    # Ids, their copies and the results take 3.4 times the texts, with all packs at once 7 times.
    assert peak < 5 * sum(map(sys.getsizeof, documents))


@pytest.mark.parametrize("top_n", [1, 2, 5, 6, 1000])
def test_rank_top_n_keeps_the_first(reranker: Reranker, top_n: int) -> None:
    ranking = reranker.rank(QUERY, FRUIT, top_n=top_n)
    check_ranking(ranking, FRUIT, top_n=top_n)
    assert indices(ranking) == ORDER[:top_n]


# Scores are 0.62, 0.38 twice and 0.18 twice.
@pytest.mark.parametrize(("threshold", "num_kept"), [(0, 5), (0.3, 3), (0.5, 1), (0.9, 0), (1, 0)])
def test_rank_threshold_keeps_the_scores_above(
    reranker: Reranker, threshold: float, num_kept: int
) -> None:
    ranking = reranker.rank(QUERY, FRUIT, score_threshold=threshold)
    check_ranking(ranking, FRUIT, score_threshold=threshold)
    assert indices(ranking) == ORDER[:num_kept]


def test_rank_threshold_keeps_a_score_equal_to_it(reranker: Reranker) -> None:
    threshold = reranker.rank(QUERY, FRUIT)[1].score
    ranking = reranker.rank(QUERY, FRUIT, score_threshold=threshold)
    check_ranking(ranking, FRUIT, score_threshold=threshold)
    assert indices(ranking) == ORDER[:3]


@pytest.mark.parametrize(("top_n", "num_kept"), [(2, 2), (4, 3)])
def test_rank_applies_threshold_and_top_n_together(
    reranker: Reranker, top_n: int, num_kept: int
) -> None:
    ranking = reranker.rank(QUERY, FRUIT, score_threshold=0.3, top_n=top_n)
    check_ranking(ranking, FRUIT, score_threshold=0.3, top_n=top_n)
    assert indices(ranking) == ORDER[:num_kept]


def test_rank_reads_subclasses_of_str_as_plain_strings(reranker: Reranker) -> None:
    class Text(str):
        __slots__ = ()

        def __radd__(self, other: str) -> str:
            raise AssertionError("what a subclass redefines must not act in a prompt")

    ranking = reranker.rank(Text(QUERY), [Text(text) for text in FRUIT])
    assert ranking == reranker.rank(QUERY, FRUIT)
    assert all(type(result.document) is str for result in ranking)


def test_rank_accepts_any_iterable_with_an_order(reranker: Reranker) -> None:
    for documents in (tuple(FRUIT), dict(enumerate(FRUIT)).values(), (text for text in FRUIT)):
        check_ranking(reranker.rank(QUERY, documents), FRUIT)  # type: ignore[arg-type]


def test_rank_scores_blank_documents_like_any_other(reranker: Reranker) -> None:
    documents = ["", " ", "\n", "red", "\0", "\ufeff"]
    ranking = reranker.rank(QUERY, documents)
    check_ranking(ranking, documents)
    assert indices(ranking)[0] == 3


def test_rank_leaves_the_callers_lists_unchanged(reranker: Reranker) -> None:
    documents = [*FRUIT, f"broken {HIGH}"]
    queries, lists, instructions = [QUERY, "plum"], [documents, documents], ["Find", None]
    before = copy.deepcopy((documents, queries, lists, instructions))
    reranker.rank(QUERY, documents, top_n=2)
    reranker.rank_many(queries, lists, instruction=instructions)
    assert (documents, queries, lists, instructions) == before
    assert lists[0] is documents


def test_score_is_aligned_with_the_documents(reranker: Reranker) -> None:
    scores = reranker.score(QUERY, FRUIT)
    assert scores == pytest.approx([sigmoid(shared - 1.5) for shared in (0, 2, 1, 0, 1)])
    assert all(type(score) is float for score in scores)


def test_log_odds_are_aligned_with_the_documents(reranker: Reranker) -> None:
    expected = in_order(reranker.rank(QUERY, FRUIT))
    assert reranker.log_odds(QUERY, FRUIT) == expected
    assert asyncio.run(reranker.alog_odds(QUERY, FRUIT)) == expected
    assert reranker.log_odds(QUERY, []) == []
    with pytest.raises(InputError):
        reranker.log_odds(QUERY, "fruit")


def test_log_odds_are_the_models_own_beside_a_calibration(model: fakes.FakeModel) -> None:
    calibrated = Reranker("model", calibration=Calibration(temperature=2.0, bias=-1.0))
    assert calibrated.log_odds(QUERY, FRUIT) == Reranker("model").log_odds(QUERY, FRUIT)
    assert calibrated.score(QUERY, FRUIT) != Reranker("model").score(QUERY, FRUIT)


def test_score_pairs_is_aligned_for_interleaved_queries(
    reranker: Reranker, model: fakes.FakeModel
) -> None:
    pairs = [
        ("red apple", "red apple"),
        ("blue plum", "red apple"),
        ("red apple", "blue apple"),
        ("blue plum", "blue plum"),
        ("red apple", "blue plum"),
        ("blue plum", "blue apple"),
    ]
    scores = reranker.score_pairs(pairs)
    assert scores == pytest.approx([sigmoid(shared - 1.5) for shared in (2, 0, 1, 2, 0, 1)])
    assert scores == [reranker.score(query, [document])[0] for query, document in pairs]
    assert model.network.heads[:2] == [head_ids(None, "red apple"), head_ids(None, "blue plum")]


def test_score_pairs_equal_queries_share_their_head(reranker: Reranker) -> None:
    reranker.score_pairs([[QUERY, "pear"], [QUERY, "plum"], (QUERY, "pear")])  # type: ignore[list-item]
    assert reranker.usage.documents == 3
    assert reranker.usage.tokens == num_tokens(QUERY, ["pear", "plum"])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda r: r.rank("q", ["straw", "hay", "needle"]), r"documents\[2\]"),
        (lambda r: r.rank("q", ["straw " * 300, "needle"]), r"documents\[1\]"),
        (lambda r: r.rank("q", ["straw", "hay " * 300 + "needle"]), r"documents\[1\]"),
        (lambda r: r.rank_many(["q", "r"], [["a"], ["b", "needle"]]), r"documents\[1\]\[1\]"),
        (
            lambda r: r.score_pairs([("q", "a"), ("r", "b"), ("q", "hay " * 300), ("q", "needle")]),
            r"document of pairs\[3\]",
        ),
        (lambda r: asyncio.run(r.arank("q", ["hay " * 300, "needle"])), r"documents\[1\]"),
    ],
)
@pytest.mark.parametrize("error", [DocumentTooLargeError, NonFiniteScoreError])
def test_errors_name_what_the_caller_passed(
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[Reranker], Any],
    name: str,
    error: type[Exception],
) -> None:
    tokenizer = fakes.small_tokenizer()
    (document,) = tokenizer.encode_group(None, "q", ["needle"], max_length=999).documents
    needle = set(document[: -len(tokenizer.suffix)].tolist())

    class Network(fakes.FakeNetwork):
        def score(self, pack: Pack) -> NDArray[np.float32]:
            has = [
                needle <= set(pack.token_ids[document].tolist())
                for span in pack.spans
                for document in span.documents
            ]
            if any(has) and error is DocumentTooLargeError:
                raise MemoryError
            return np.where(has, np.float32(np.nan), np.float32(0))

    with fakes.loaded(monkeypatch, fakes.FakeModel(network=Network())):
        reranker = Reranker("fake", max_length=128, window_score="max")
        with pytest.raises(error, match=name + " does" if "Large" in error.__name__ else name):
            call(reranker)


def test_query_that_is_too_long_is_named_by_its_pair(reranker: Reranker) -> None:
    pairs = [("q", "a"), ("q", "b"), ("word " * 9000, "c")]
    with pytest.raises(InputError, match=r"^query of pairs\[2\]: query and instruction take"):
        reranker.score_pairs(pairs)
    with pytest.raises(InputError, match=r"^queries\[1\]: query"):
        reranker.rank_many(["q", "word " * 9000], [["a"], ["b"]])


def test_rank_many_keeps_the_order_of_queries(reranker: Reranker) -> None:
    queries = ["red apple", "blue plum", "red apple", "pear"]
    lists = [FRUIT, FRUIT[::-1], [], ["plum", "pear"]]
    rankings = reranker.rank_many(queries, lists)
    for query, documents, ranking in zip(queries, lists, rankings, strict=True):
        check_ranking(ranking, documents)
        assert ranking == reranker.rank(query, documents)


def test_rank_many_cuts_each_ranking(reranker: Reranker) -> None:
    rankings = reranker.rank_many([QUERY, "plum"], [FRUIT, FRUIT[:2]], top_n=3, score_threshold=0.3)
    assert [indices(ranking) for ranking in rankings] == [[1, 2, 4], []]


def test_rank_many_takes_an_instruction_per_query(model: fakes.FakeModel) -> None:
    reranker = Reranker("model", instruction="Default here")
    queries, instructions = ["a", "b", "c"], ["First", None, ""]
    rankings = reranker.rank_many(queries, [FRUIT] * 3, instruction=instructions)
    for ranking in rankings:
        check_ranking(ranking, FRUIT)
    assert model.network.heads == [
        head_ids("First", "a"), head_ids("Default here", "b"), head_ids("", "c")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("of_reranker", "of_call", "used"),
    [
        (None, None, None),
        ("Find code", None, "Find code"),
        (None, "Find law", "Find law"),
        ("Find code", "Find law", "Find law"),
        ("Find code", "", ""),
        ("", None, ""),
    ],
)
def test_instruction_of_call_precedes_rerankers_precedes_templates(
    model: fakes.FakeModel, of_reranker: str | None, of_call: str | None, used: str | None
) -> None:
    reranker = Reranker("model", instruction=of_reranker)
    reranker.rank(QUERY, ["a"], instruction=of_call)
    reranker.score(QUERY, ["a"], instruction=of_call)
    reranker.score_pairs([(QUERY, "a")], instruction=of_call)
    reranker.rank_many([QUERY], [["a"]], instruction=of_call)
    asyncio.run(reranker.arank(QUERY, ["a"], instruction=of_call))
    asyncio.run(reranker.ascore(QUERY, ["a"], instruction=of_call))
    assert model.network.heads == [head_ids(used, QUERY)] * 6


def test_observers_of_the_weights_are_told_of_each_pack(reranker: Reranker) -> None:
    records: list[Any] = []
    reranker.observe(records.append)
    reranker.rank(QUERY, FRUIT)
    reranker.score(QUERY, FRUIT[:1])  # the owner tells after it answers; by now the first is told
    assert records[0].documents == len(set(FRUIT))
    assert records[0].requests == 1


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_rank_raises_what_the_network_raised_and_works_again(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    outcomes: list[BaseException | None] = [error("first forward"), None]

    def score(pack: Pack) -> NDArray[np.float32]:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome
        return np.zeros(len(pack.last_tokens), np.float32)

    with fakes.loaded(monkeypatch, fakes.FakeModel(Network(score))):
        reranker = Reranker("model")
        with pytest.raises(error, match="first forward"):
            reranker.rank(QUERY, FRUIT)
        assert reranker.usage == Usage()
        check_ranking(reranker.rank(QUERY, FRUIT), FRUIT)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(800.0, 1.0), (-800.0, 0.0), (0.0, 0.5), (2.0, 0.880797077978), (-20.0, 2.061153618e-09)],
)
def test_rank_large_log_odds_do_not_overflow(
    monkeypatch: pytest.MonkeyPatch, value: float, expected: float
) -> None:
    network = Network(lambda pack: np.full(len(pack.last_tokens), value, np.float32))
    with fakes.loaded(monkeypatch, fakes.FakeModel(network)):
        (result,) = Reranker("model").rank(QUERY, ["a"])
    assert result.log_odds == np.float32(value)
    assert result.score == pytest.approx(expected, rel=1e-9)


def test_rank_orders_by_log_odds_where_probabilities_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(lambda pack: np.arange(40, 40 + len(pack.last_tokens), dtype=np.float32))
    documents = ["a", "b", "c"]
    with fakes.loaded(monkeypatch, fakes.FakeModel(network)):
        ranking = Reranker("model").rank(QUERY, documents)
    check_ranking(ranking, documents)
    assert [result.score for result in ranking] == [1.0] * 3
    assert [result.log_odds for result in ranking] == [42.0, 41.0, 40.0]


def test_truncated_documents_are_flagged_and_counted(model: fakes.FakeModel) -> None:
    documents = ["short", "red " * 50, "red apple", "word " * 500]
    reranker = Reranker("model", max_length=num_tokens(QUERY, ["red apple"]) + 10)
    ranking = reranker.rank(QUERY, documents)
    check_ranking(ranking, documents)
    assert {result.index: result.truncated for result in ranking} == {
        0: False, 1: True, 2: False, 3: True
    }  # fmt: skip
    assert reranker.usage.truncated == 2
    longest = max(s.stop - s.start for p in model.network.packs for s in p.spans[0].documents)
    assert len(head_ids(None, QUERY)) + longest == num_tokens(QUERY, ["red apple"]) + 10


def test_default_max_length_adapts_to_the_models_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes.loaded(monkeypatch, fakes.FakeModel(max_positions=128)):
        (result,) = Reranker("model").rank(QUERY, ["word " * 500])
    assert result.truncated


def test_max_length_beyond_the_models_positions_is_refused(reranker: Reranker) -> None:
    with pytest.raises(InputError, match=r"max_length must be at most 40960 .* got 40961"):
        Reranker("model", max_length=40961).rank(QUERY, ["a"])


def test_query_longer_than_max_length_is_refused_with_both_numbers(
    model: fakes.FakeModel,
) -> None:
    query = "CANARY " * 300
    needed = len(head_ids(None, query)) + 9
    with pytest.raises(InputError, match=f"take {needed} tokens .* max_length is 200") as caught:
        Reranker("model", max_length=200).rank(query, ["CANARY"])
    assert "CANARY" not in str(caught.value)
    assert not model.network.packs


def test_usage_counts_every_call(reranker: Reranker) -> None:
    assert reranker.usage == Usage()
    reranker.rank(QUERY, FRUIT, top_n=1)
    reranker.score(QUERY, ["pear", "pear"])
    tokens = num_tokens(QUERY, FRUIT) + num_tokens(QUERY, ["pear"])
    whole = sum(num_tokens(QUERY, [document]) for document in [*FRUIT, "pear", "pear"])
    assert reranker.usage == Usage(documents=7, tokens=tokens, prompt_tokens=whole)


def test_usage_belongs_to_one_reranker(reranker: Reranker) -> None:
    reranker.rank(QUERY, FRUIT)
    assert Reranker("model").usage == Usage()


@pytest.mark.parametrize(
    "broken",
    [HIGH, LOW, f"a{HIGH}b", LOW + HIGH, "\udc80 from surrogateescape", HIGH + HIGH],
    ids=ascii,
)
@pytest.mark.parametrize("place", [0, 3, 7])
def test_lone_surrogates_are_repaired_and_counted(
    reranker: Reranker, broken: str, place: int
) -> None:
    documents = [f"red {i}" for i in range(8)]
    expected = reranker.score(QUERY, documents)
    documents[place] = broken
    ranking = reranker.rank(QUERY, documents)
    check_ranking(ranking, documents)
    assert reranker.usage.repaired == 1
    for result in ranking:
        assert result.index == place or result.score == expected[result.index]


def test_lone_surrogates_in_query_and_instruction_are_counted(reranker: Reranker) -> None:
    reranker.rank(f"red {HIGH}", ["a", f"b{LOW}"], instruction=f"Find {LOW}")
    assert reranker.usage.repaired == 3


def test_split_surrogate_pairs_are_joined(reranker: Reranker) -> None:
    documents = [f"{HIGH}{LOW} pear", "😀 pear"]
    first, second = reranker.rank(QUERY, documents)
    assert first.log_odds == second.log_odds
    assert reranker.usage.tokens == num_tokens(QUERY, ["😀 pear"])


def test_texts_never_reach_logs_or_repr(
    reranker: Reranker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ranking = reranker.rank(f"CANARY {HIGH}", ["CANARY", f"CANARY {LOW}"], instruction="CANARY")
    assert "texts concerned: 2" in caplog.text
    assert "CANARY" not in caplog.text + repr(ranking) + repr(reranker)


def test_context_manager_closes(reranker: Reranker) -> None:
    with reranker as entered:
        assert entered is reranker
        reranker.rank(QUERY, FRUIT)
    with pytest.raises(ClosedError, match="this reranker is closed"):
        reranker.rank(QUERY, FRUIT)
    assert reranker.usage.documents == len(FRUIT)


@pytest.mark.parametrize(
    "call",
    [
        lambda reranker: reranker.rank("q", ["a"]),
        lambda reranker: reranker.rank("q", []),
        lambda reranker: reranker.rank_many([], []),
        lambda reranker: reranker.score("q", ["a"]),
        lambda reranker: reranker.score_pairs([("q", "a")]),
        lambda reranker: asyncio.run(reranker.arank("q", ["a"])),
        lambda reranker: asyncio.run(reranker.ascore("q", ["a"])),
        lambda reranker: reranker.loaded,
    ],
)
def test_closed_reranker_refuses_every_verb(reranker: Reranker, call: Any) -> None:
    reranker.close()
    reranker.close()
    with pytest.raises(ClosedError, match=r"is closed\. Make a new one"):
        call(reranker)


def test_repr_shows_the_model_without_loading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.forbid_loading(monkeypatch)
    reranker = Reranker("some/model")
    assert repr(reranker) == "Reranker('some/model')"
    reranker.close()
    assert repr(reranker) == "Reranker('some/model')"


def test_subclass_keeps_its_name_and_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Reranker):
        pass

    fakes.forbid_loading(monkeypatch)
    assert repr(Mine.shared("some/model")) == "Mine('some/model')"


def test_reranker_is_a_scorer() -> None:
    assert isinstance(Reranker("model"), Scorer)
    assert not isinstance(object(), Scorer)


class Terminal(io.StringIO):
    """Standard error that somebody watches."""

    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_reranker.engine.progress._PROGRESS_AFTER_S", 0)
    for stderr, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stderr)
        reranker.rank(HIGH, [LOW, HIGH])
        assert ("Reranking" in stderr.getvalue()) is is_shown


def test_long_job_without_stderr_is_scored(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_reranker.engine.progress._PROGRESS_AFTER_S", 0)
    monkeypatch.setattr(sys, "stderr", None)
    assert len(reranker.rank(HIGH, [LOW, HIGH])) == 2

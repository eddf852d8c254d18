from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.metrics import (
    MAX_SATURATED,
    METRICS,
    MIN_DEVIATION,
    ScoredSet,
    Spread,
    alarms,
    compare,
    heuristics,
    measure,
    reliability,
    spread,
)
from qwen3_reranker import InputError
from qwen3_reranker.data.candidates import CandidateList, ndcg_at_10

ROOT = Path(__file__).parents[2]


def listed(
    labels: list[int] | None, missing: list[int] | None = None, texts: list[str] | None = None
) -> CandidateList:
    texts = texts if texts is not None else ["text"] * len(labels or [])
    # One name for all queries and documents: nothing may depend on names.
    return CandidateList("q", "query", None, ["d"] * len(texts), texts, labels, missing or [])


def scored(*rows: tuple[list[int], list[float]], missing: list[int] | None = None) -> ScoredSet:
    lists = [listed(labels, missing) for labels, _ in rows]
    return ScoredSet("set", lists, [log_odds for _, log_odds in rows])


def brute_force(
    labels: list[int], scores: list[float], missing: list[int], relevant_from: int
) -> dict[str, float]:
    """Definitions spelt out, on the worst of the orders that the scores allow."""
    ranked = [label for _, label in sorted(zip((-s for s in scores), labels, strict=True))]
    total = sum(label >= relevant_from for label in labels + missing)
    hits = [rank for rank, label in enumerate(ranked, 1) if label >= relevant_from]
    return {
        "nDCG@10": ndcg_at_10(labels, scores, missing),
        "MRR@10": 1 / hits[0] if hits and hits[0] <= 10 else 0.0,
        "MAP": sum(n / rank for n, rank in enumerate(hits, 1)) / total if total else 0.0,
        "R@10": sum(rank <= 10 for rank in hits) / total if total else 0.0,
    }


one_list = st.tuples(
    st.lists(
        # Few distinct scores make ties, and some of them are one number in single precision.
        st.tuples(
            st.integers(0, 3), st.sampled_from([-20.0, -1.0, 0.0, 1e-12, 1.0, 1 + 1e-12, 30])
        ),
        max_size=25,
    ),
    st.lists(st.integers(0, 3), max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(one_list, min_size=1, max_size=4), st.integers(1, 3))
def test_measure_equals_the_definitions(
    rows: list[tuple[list[tuple[int, float]], list[int]]], relevant_from: int
) -> None:
    lists = [listed([label for label, _ in pairs], missing) for pairs, missing in rows]
    log_odds = [[score for _, score in pairs] for pairs, _ in rows]
    if not any(log_odds):
        return
    measured = measure(ScoredSet("set", lists, log_odds), relevant_from=relevant_from)
    assert tuple(measured) == METRICS
    for i, (each, row) in enumerate(zip(lists, log_odds, strict=True)):
        expected = brute_force(each.labels or [], row, each.missing_labels, relevant_from)
        for name in METRICS:
            assert measured[name][i] == pytest.approx(expected[name], abs=1e-9), name


def test_measure_of_long_random_lists_equals_the_definitions() -> None:
    rng = random.Random(7)
    lists, log_odds = [], []
    for _ in range(30):
        size = rng.randrange(1, 120)
        lists.append(listed([rng.choice([0, 0, 0, 1, 2]) for _ in range(size)], [1] * 3))
        log_odds.append([rng.gauss(0, 8) for _ in range(size)])
    measured = measure(ScoredSet("set", lists, log_odds))
    for i, (each, row) in enumerate(zip(lists, log_odds, strict=True)):
        expected = brute_force(each.labels or [], row, [1] * 3, 1)
        assert {name: measured[name][i] for name in METRICS} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("given_order", [[1, 0, 0, 0], [0, 0, 0, 1]])
def test_measure_constant_scorer_gets_the_worst_order(given_order: list[int]) -> None:
    measured = measure(scored((given_order, [5.0] * 4)))
    assert measured["MRR@10"] == [0.25]
    assert measured["MAP"] == [0.25]
    assert measured["nDCG@10"] == [pytest.approx(1 / math.log2(5))]


def test_measure_ranks_where_p_yes_has_become_one() -> None:
    # Both are P(yes) = 1.0 in float64, and one number in float32.
    measured = measure(scored(([0, 1], [500.0, 500.0 + 1e-9])))
    assert measured["MRR@10"] == [1.0]


def test_measure_missing_labels_count_as_never_retrieved() -> None:
    measured = measure(scored(([1, 0], [2.0, 1.0]), missing=[1, 0, 2]))
    assert measured["R@10"] == [pytest.approx(1 / 3)]
    assert measured["MAP"] == [pytest.approx(1 / 3)]
    assert measured["MRR@10"] == [1.0]
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert measured["nDCG@10"] == [pytest.approx(1 / ideal)]


def test_measure_query_without_relevant_documents_scores_0_and_stays() -> None:
    measured = measure(scored(([0, 0], [1.0, 2.0]), ([1, 0], [2.0, 1.0]), ([], [])))
    assert all(values == [0.0, 1.0, 0.0] for values in measured.values())


def test_measure_relevant_from_moves_all_but_ndcg() -> None:
    graded = scored(([1, 2], [2.0, 1.0]))
    one, two = measure(graded), measure(graded, relevant_from=2)
    assert (one["MRR@10"], two["MRR@10"]) == ([1.0], [0.5])
    assert (one["MAP"], two["MAP"]) == ([1.0], [0.5])
    assert one["nDCG@10"] == two["nDCG@10"]


def test_scored_set_takes_an_unlabelled_list_without_candidates() -> None:
    lists = [listed(None, [1]), listed([1])]
    assert measure(ScoredSet("set", lists, [[], [1.0]]))["nDCG@10"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("lists", "log_odds", "fragment"),
    [
        ([listed([1])], [[1.0], [2.0]], "one row per query and a score, got 2 scores in 2 rows"),
        ([], [], "got 0 scores in 0 rows for 0 queries"),
        ([listed([], [1])], [[]], "got 0 scores in 1 rows for 1 queries"),
        ([listed([1, 0])], [[1.0]], r"log_odds\[0\] of 'dev' must hold one finite.* got 1 for 2"),
        ([listed([1]), listed([0])], [[1.0], [math.nan]], r"log_odds\[1\].* 1 of them NaN"),
        ([listed([1])], [[-math.inf]], "NaN or infinite"),
        ([listed(None, texts=["a"])], [[1.0]], r"log_odds\[0\] .* without labels"),
    ],
)
def test_scored_set_refuses_what_cannot_be_measured(
    lists: list[CandidateList], log_odds: list[list[float]], fragment: str
) -> None:
    with pytest.raises(InputError, match=fragment):
        ScoredSet("dev", lists, log_odds)


def test_scored_set_errors_never_quote_texts() -> None:
    each = CandidateList("q", "CANARY", "CANARY", ["d"], ["CANARY"], None, [])
    with pytest.raises(InputError) as caught:
        ScoredSet("dev", [each], [[1.0]])
    assert "CANARY" not in str(caught.value)


def test_measure_and_reliability_refuse_parameters_below_1() -> None:
    one = scored(([1], [1.0]))
    with pytest.raises(InputError, match="relevant_from must be at least 1, got 0"):
        measure(one, relevant_from=0)
    with pytest.raises(InputError, match="relevant_from must be at least 1"):
        reliability(one, relevant_from=0)
    with pytest.raises(InputError, match="bins must be at least 1, got 0"):
        reliability(one, bins=0)


def test_heuristics_order_by_place_and_length() -> None:
    each = listed([0, 0, 0], texts=["ab", "abc", "a"])
    assert heuristics([each, listed([])]) == {
        "given order": [[0.0, -1.0, -2.0], []],
        "shortest first": [[-2.0, -3.0, -1.0], []],
        "longest first": [[2.0, 3.0, 1.0], []],
    }


def test_compare_counts_and_means() -> None:
    # 0.1 + 0.2 is not 0.3: a tie all the same.
    found = compare([0.5, 0.5, 0.5, 0.3], [1.0, 0.25, 0.5, 0.1 + 0.2])
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)
    assert found.mean_before == pytest.approx(0.45)
    assert found.difference == pytest.approx(found.mean_after - found.mean_before)
    assert found.ci_low <= found.difference <= found.ci_high


def test_compare_nothing_changed_has_p_1_and_an_interval_of_0() -> None:
    found = compare([0.25, 0.5], [0.25, 0.5])
    assert (found.p_value, found.ci_low, found.ci_high, found.ties) == (1.0, 0.0, 0.0, 2)


@pytest.mark.parametrize(
    # Of all sign flips, as many are as extreme. The sum of the second is 0.20000000000000004.
    ("after", "expected"), [([0.1] * 5 + [0.0] * 20, 2 / 32), ([0.1, 0.1, 0.1, -0.1], 10 / 16)]
)  # fmt: skip
def test_compare_p_value_equals_all_sign_flips_counted(after: list[float], expected: float) -> None:
    found = compare([0.0] * len(after), after, rounds=20_000)
    assert found.p_value == pytest.approx(expected, abs=0.01)


def test_compare_is_the_same_for_the_same_seed() -> None:
    rng = random.Random(1)
    before, after = ([rng.random() for _ in range(40)] for _ in range(2))
    assert compare(before, after, rounds=500) == compare(before, after, rounds=500)
    assert compare(before, after, rounds=500, seed=1) != compare(before, after, rounds=500)


def test_compare_swapped_mirrors_the_difference() -> None:
    rng = random.Random(2)
    before, after = ([rng.random() for _ in range(40)] for _ in range(2))
    one, two = compare(before, after), compare(after, before)
    assert one.p_value == pytest.approx(two.p_value, abs=0.02)
    assert one.difference == -two.difference
    assert (one.wins, one.losses) == (two.losses, two.wins)
    assert one.ci_low == pytest.approx(-two.ci_high, abs=0.02)


def _noisy(seed: int, shift: float) -> tuple[list[float], list[float]]:
    """Two metrics of 30 queries, skewed, with ties, that differ by noise and a shift."""
    rng = random.Random(seed)
    before = [rng.choice([0.0, 0.5, 1.0, rng.random()]) for _ in range(30)]
    after = [v if rng.random() < 0.3 else v + rng.gauss(shift, 0.2) for v in before]
    return before, after


def test_compare_finds_what_is_not_there_in_one_of_twenty_data_sets() -> None:
    found = [compare(*_noisy(seed, 0.0), rounds=199, seed=seed) for seed in range(300)]
    false = sum(each.p_value <= 0.05 for each in found)
    assert 5 <= false <= 27  # 15 expected; 99.8 % of binomial draws
    covered = sum(each.ci_low <= 0 <= each.ci_high for each in found)
    assert covered >= 265  # 285 promised; the percentile interval is a little narrow at 30 queries


def test_compare_finds_what_is_there() -> None:
    found = [compare(*_noisy(seed, 0.2), rounds=199, seed=seed) for seed in range(50)]
    assert sum(each.p_value <= 0.05 for each in found) >= 45
    assert all(each.p_value >= 1 / 200 for each in found)


@pytest.mark.parametrize(
    ("before", "after"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [math.nan]), ([math.inf], [1.0])]
)
def test_compare_refuses_what_is_not_paired(before: list[float], after: list[float]) -> None:
    with pytest.raises(InputError, match="finite values of the same queries"):
        compare(before, after)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_reliability_equals_hand_computed_bins() -> None:
    found = reliability(scored(([0, 1, 1, 0], [logit(p) for p in (0.12, 0.14, 0.95, 0.75)])))
    assert [(each.low, each.high, each.count) for each in found.bins] == [
        (0.1, 0.2, 2),
        (0.7, 0.8, 1),
        (0.9, 1.0, 1),
    ]
    assert [each.mean_p_yes for each in found.bins] == pytest.approx([0.13, 0.75, 0.95])
    assert [each.observed for each in found.bins] == [0.5, 0.0, 1.0]
    assert found.ece == pytest.approx((2 * 0.37 + 0.75 + 0.05) / 4)


def test_reliability_takes_the_extremes() -> None:
    found = reliability(scored(([0, 1, 1], [-2000.0, 2000.0, 40.0])))
    assert found.ece == 0.0
    assert [(each.low, each.high) for each in found.bins] == [(0.0, 0.1), (0.9, 1.0)]
    assert sum(each.count for each in found.bins) == 3


def test_reliability_of_a_calibrated_scorer_is_small_and_of_a_sharpened_one_is_not() -> None:
    rng = random.Random(3)
    p = [rng.random() for _ in range(5000)]
    labels = [int(rng.random() < each) for each in p]
    calm, sharp = ([factor * logit(each) for each in p] for factor in (1, 8))
    assert reliability(scored((labels, calm))).ece < 0.03
    assert reliability(scored((labels, sharp))).ece > 0.15


def test_reliability_relevant_from_counts() -> None:
    assert reliability(scored(([1], [0.0])), relevant_from=2).bins[0].observed == 0.0


def test_spread_equals_hand_computed_shares() -> None:
    found = spread(scored(([1, 0], [8.0, -8.0]), ([0, 0], [2.0, 2.0]), ([1], [0.0])))
    assert found.deviation == 4.0  # of 8 and 0; the query with one document has none
    assert found.constant == 0.5
    assert (found.high, found.low) == (0.2, 0.2)
    assert found.relevant == 0.4
    assert found.mean_p_yes == pytest.approx((1 + 2 / (1 + math.exp(-2)) + 0.5) / 5)


def test_spread_of_single_documents_says_nothing_about_constants() -> None:
    found = spread(scored(([1], [0.0]), ([0], [0.0])))
    assert (found.deviation, found.constant) == (None, 0.0)
    assert alarms(found) == []


HEALTHY = Spread(deviation=4.0, constant=0.0, high=0.02, low=0.8, mean_p_yes=0.05, relevant=0.02)


def test_alarms_are_silent_on_a_healthy_spread() -> None:
    assert alarms(HEALTHY) == []


def test_alarms_name_each_collapse() -> None:
    rng = random.Random(4)
    labels = [1] + [0] * 19
    constant = [[0.3 + rng.gauss(0, 1e-6) for _ in labels] for _ in range(5)]
    equal = [[0.3] * 20] * 5
    saturated = [[40.0] + [-40.0] * 19] * 5
    yes = [[5.0 + rng.gauss(0, 1) for _ in labels] for _ in range(5)]
    no = [[-6.5 + rng.gauss(0, 0.5) for _ in labels] for _ in range(5)]
    for rows, expected in [
        (constant, ["Constant scores", "Yes-bias"]),
        (equal, ["Constant scores", "Yes-bias"]),
        (saturated, ["Saturated scores"]),
        (yes, ["Yes-bias"]),
        (no, ["No-bias"]),
    ]:
        found = alarms(spread(ScoredSet("set", [listed(labels)] * 5, rows)))
        assert [each.split(":")[0] for each in found] == expected


def test_alarms_start_at_their_thresholds() -> None:
    def count(**changes: float) -> int:
        return len(alarms(replace(HEALTHY, **changes)))

    assert (count(deviation=MIN_DEVIATION), count(deviation=MIN_DEVIATION - 1e-6)) == (0, 1)
    assert (count(low=MAX_SATURATED, high=0.0), count(low=MAX_SATURATED, high=0.005)) == (0, 1)
    assert count(deviation=0.0) == 1


@pytest.mark.parametrize("module", ["metrics", "report"])
def test_import_needs_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "matplotlib", "ir_measures"}
    code = f"import sys, finetune.{module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

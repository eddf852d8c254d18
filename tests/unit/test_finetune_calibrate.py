"""`qwen3-finetune calibrate`: what is fitted, how sure it is, what is written."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace

import numpy as np
import pytest

from finetune import metrics
from finetune.cli import main
from finetune.fitting import MIN_KEPT, calibrated, curve, fit, lowest, precision_at, quality
from finetune.metrics import ScoredSet
from qwen3_reranker import Calibration, DataError
from qwen3_reranker.call.results import probability
from qwen3_reranker.data.candidates import CandidateList

TEMPERATURE, BIAS = 2.5, -0.7


def scored(log_odds: list[list[float]], labels: list[list[int]]) -> ScoredSet:
    lists = [
        CandidateList("q", f"query {i}", None, ["d"] * len(row), ["text"] * len(row), row, [])
        for i, row in enumerate(labels)
    ]
    return ScoredSet("made up", lists, log_odds)


def overconfident(num_queries: int = 300, num_documents: int = 20, seed: int = 0) -> ScoredSet:
    """Draw labels from sigmoid(s / TEMPERATURE + BIAS), so that these two are right."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(-3, 5, (num_queries, num_documents))
    shares = 1 / (1 + np.exp(-(log_odds / TEMPERATURE + BIAS)))
    labels = (rng.random(shares.shape) < shares).astype(int)
    return scored(log_odds.tolist(), labels.tolist())


def shuffled(given: ScoredSet, seed: int) -> ScoredSet:
    flat = [label for each in given.lists for label in each.labels or []]
    random.Random(seed).shuffle(flat)
    labels = np.reshape(flat, (len(given.lists), -1))
    return scored(given.log_odds, labels.tolist())


def test_fit_recovers_temperature_and_bias() -> None:
    found = fit(overconfident())
    assert math.isclose(found.temperature, TEMPERATURE, rel_tol=0.06)
    assert math.isclose(found.bias, BIAS, abs_tol=0.08)


def test_fit_gains_on_queries_it_has_not_seen_and_keeps_every_order() -> None:
    found, unseen = fit(overconfident()), overconfident(seed=1)
    before, after = quality(unseen), quality(calibrated(unseen, found))
    assert after.log_loss < 0.8 * before.log_loss
    assert after.reliability.ece < 0.02 < 0.1 < before.reliability.ece
    # What it says of itself is what others find.
    assert math.isclose(found.after.log_loss, after.log_loss, rel_tol=0.05)
    assert math.isclose(found.before.log_loss, before.log_loss, rel_tol=0.05)
    for was, now in zip(unseen.log_odds, calibrated(unseen, found).log_odds, strict=True):
        assert np.argsort(was).tolist() == np.argsort(now).tolist()


def test_fit_of_calibrated_scores_changes_next_to_nothing() -> None:
    right = calibrated(overconfident(), fit(overconfident()))
    found = fit(right)
    assert math.isclose(found.temperature, 1, abs_tol=1e-4)
    assert math.isclose(found.bias, 0, abs_tol=1e-4)


def test_calibrated_log_odds_are_what_the_core_makes_scores_of() -> None:
    some = overconfident(MIN_KEPT + 10)
    found = fit(some)
    served = Calibration(found.temperature, found.bias)
    for was, now in zip(some.log_odds, calibrated(some, found).log_odds, strict=True):
        assert [probability(value) for value in now] == [served.probability(v) for v in was]


def test_log_loss_equals_hand_computed() -> None:
    some = scored([[math.log(3), 0.0]], [[1, 0]])
    assert math.isclose(quality(some).log_loss, -(math.log(0.75) + math.log(0.5)) / 2)
    extreme = scored([[-2000.0, 2000.0]], [[1, 0]])
    assert quality(extreme).log_loss == 2000.0


def test_shuffled_labels_are_refused_because_nothing_is_gained() -> None:
    some = overconfident(50, 8)
    for seed in range(30):  # some have a better log-loss, by chance
        with pytest.raises(DataError, match="the scores say nothing about these labels"):
            fit(shuffled(some, seed))
    fit(some)


def test_scores_that_rank_backwards_are_refused() -> None:
    some = overconfident()
    backwards = [[-value for value in row] for row in some.log_odds]
    with pytest.raises(DataError, match=r"say nothing .* Check the labels"):
        fit(ScoredSet("backwards", some.lists, backwards))


def test_separable_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"no finite temperature fits.* Add harder candidates"):
        fit(scored([[1.0, -1.0]] * 40, [[1, 0]] * 40))


@pytest.mark.parametrize("odd", [[-2.0, 2.0], [1.0, 1.0]], ids=["misordered", "tied"])
def test_labels_that_all_but_one_query_separates_are_refused_as_such(odd: list[float]) -> None:
    rows = [[1.0 + i % 7, -1.0 - i % 5] for i in range(39)]
    with pytest.raises(DataError, match="or all but a few have, so no finite temperature fits"):
        fit(scored([*rows, odd], [[1, 0]] * 40))


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        ([[1, 0]] * 19, "got 19 and 19 of 19"),
        ([[1, 1]] * 40, "got 40 and 0 of 40"),
        ([[0, 0]] * 40, "got 0 and 40 of 40"),
        ([[1, 0] * 500] * 3, "got 3 and 3 of 3"),
    ],
)
def test_too_few_judgments_are_refused(labels: list[list[int]], counts: str) -> None:
    log_odds = [[float(i) for i in range(len(row))] for row in labels]
    with pytest.raises(DataError, match=f"needs 20 queries .* {counts}. Judge more queries"):
        fit(scored(log_odds, labels))


def test_lists_of_one_query_are_one_query() -> None:
    some = overconfident(60, 8)
    fit(some)
    thrice = [replace(each, query=f"query {i // 4}") for i, each in enumerate(some.lists)]
    with pytest.raises(DataError, match="got 15 and 15 of 15"):
        fit(replace(some, lists=thrice))


def test_precision_at_counts_what_is_kept() -> None:
    some = scored([[3.0, 1.0, -1.0], [2.0, -3.0]], [[1, 0, 1], [1, 0]])
    found = precision_at(some, 0.5)
    assert found is not None
    assert (found.kept, found.precision, found.recall) == (3, 2 / 3, 2 / 3)
    assert found.low < 2 / 3 < found.high
    assert precision_at(some, 0.999) is None


def test_lowest_threshold_reaches_the_precision_and_the_one_below_does_not() -> None:
    some = calibrated(overconfident(), fit(overconfident()))
    thresholds = curve(some)
    found = lowest(thresholds, 0.9)
    assert found is not None
    below = precision_at(some, found.score_threshold - 0.001)
    assert found.precision >= 0.9 > below.precision if below else True
    assert found.low < 0.9 < found.high
    # P is a share here, so the threshold lies below the precision of all above it.
    assert 0.6 < found.score_threshold < 0.9
    assert lowest(thresholds, 0.9999) is None
    assert min(each.kept for each in thresholds) >= MIN_KEPT


def test_interval_of_independent_pairs_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263.
    labels = [[1]] * 81 + [[0]] * 182
    found = precision_at(scored([[1.0]] * 263, labels), 0.5)
    assert found is not None
    assert [found.low, found.high] == pytest.approx([0.2553, 0.3662], abs=2e-4)


def test_interval_of_certain_looking_pairs_has_a_width() -> None:
    found = precision_at(scored([[1.0, 1.0]] * 20, [[1, 1]] * 20), 0.5)
    assert found is not None
    assert found.high == 1
    assert 0.8 < found.low < 0.9  # as 20 of 20, not 40 of 40


def test_interval_covers_the_truth_where_pairs_of_a_query_are_alike() -> None:
    rng, truth, rounds = np.random.default_rng(0), 0.8, 400
    covered = {"by query": 0, "pair by pair": 0}
    for _ in range(rounds):
        shares = rng.beta(2, 0.5, size=60)
        labels = [(rng.random(5) < share).astype(int).tolist() for share in shares]
        apart = [[label] for row in labels for label in row]
        for name, rows in (("by query", labels), ("pair by pair", apart)):
            found = precision_at(scored([[1.0] * len(row) for row in rows], rows), 0.5)
            assert found is not None
            covered[name] += found.low <= truth <= found.high
    print(covered)
    assert 0.93 <= covered["by query"] / rounds <= 0.98
    assert covered["pair by pair"] / rounds < 0.9


def test_missing_scikit_learn_is_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("finetune.calibrate", "finetune.fitting"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert main(["calibrate", "--model", "m", "--eval_file", "f"]) == 2
    assert 'pip install "qwen3-reranker[finetune,calibration]"' in capsys.readouterr().err


def test_ece_is_the_one_of_the_reports() -> None:
    some = overconfident(50)
    assert quality(some).reliability == metrics.reliability(some)

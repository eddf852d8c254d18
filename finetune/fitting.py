"""Temperature, bias and threshold, fitted to judged pairs.

Decides what judgments suffice, how the two numbers are fitted, and how sure a precision is. Knows
nothing of models: it sees log-odds and labels, 0 for irrelevant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import (  # type: ignore[import-untyped]
    StratifiedGroupKFold,
    cross_val_predict,
)

from qwen3_reranker import Calibration
from qwen3_reranker.data.candidates import CandidateList
from qwen3_reranker.errors import DataError

from . import metrics
from .metrics import Floats, ScoredSet

MIN_QUERIES = 20
"""With a relevant document, and with an irrelevant one: some ten of each per fitted number."""
MIN_KEPT = 20
"""Documents above a threshold: of fewer a precision says next to nothing."""
_FOLDS = 5
_THRESHOLDS = np.arange(1, 1000) / 1000
"""What a person can type; each is measured as it is typed."""
_CLEAR = 3.0
"""Standard errors by which scores must beat the mere share of relevant documents."""
_Z = 1.959964
"""Of a two-sided 95 % interval."""

Counts = npt.NDArray[np.signedinteger]


@dataclass(frozen=True, slots=True)
class Quality:
    """How far scores are from shares.

    Attributes:
        log_loss: Mean of -log P(what was judged), in nats.
        reliability: Bins and expected calibration error.
    """

    log_loss: float
    reliability: metrics.Reliability


@dataclass(frozen=True, slots=True)
class Fit:
    """Temperature and bias of all pairs, and what they are worth.

    Attributes:
        temperature, bias: P = sigmoid(log-odds / temperature + bias).
        before: Of the model's own scores.
        after: Of calibrated ones, each query's by a fit to other queries.
    """

    temperature: float
    bias: float
    before: Quality
    after: Quality


@dataclass(frozen=True, slots=True)
class Precision:
    """What a threshold keeps.

    Attributes:
        score_threshold: Lowest score that is kept.
        kept: Documents with at least this score.
        precision: Their share that is relevant.
        low, high: Its 95 % interval.
        recall: Share of the relevant documents that is kept.
    """

    score_threshold: float
    kept: int
    precision: float
    low: float
    high: float
    recall: float


class _Pairs(NamedTuple):
    """Judged pairs of all queries, aligned."""

    log_odds: Floats
    is_relevant: npt.NDArray[np.bool_]
    query: npt.NDArray[np.int64]


def fit(scored: ScoredSet) -> Fit:
    """Fit temperature and bias to judged pairs by their log-loss (Platt 1999), unregularised.

    No isotonic regression: its steps give documents of different log-odds one score.

    Raises:
        DataError: If there are too few judgments, or scores say nothing about them.
    """
    refuse_few(scored.lists)
    pairs = _pairs(scored)
    folds = list(StratifiedGroupKFold(_FOLDS).split(pairs.log_odds, pairs.is_relevant, pairs.query))
    for fitted in [slice(None), *(kept for kept, _ in folds)]:
        _refuse_separable(pairs.log_odds[fitted], pairs.is_relevant[fitted])
    regression = LogisticRegression(C=math.inf, solver="newton-cholesky", tol=1e-8)
    column = pairs.log_odds[:, None]  # (pairs, 1)
    elsewhere = cross_val_predict(
        regression, column, pairs.is_relevant, cv=folds, method="decision_function"
    )
    regression.fit(column, pairs.is_relevant)
    slope, bias = float(regression.coef_[0, 0]), float(regression.intercept_[0])
    before, after = quality(scored), quality(_with_log_odds(scored, elsewhere))
    share = float(pairs.is_relevant.mean())
    unread = _losses(np.full_like(elsewhere, math.log(share / (1 - share))), pairs.is_relevant)
    # Summed by query, because the pairs of one are alike.
    gains = np.bincount(pairs.query, unread - _losses(elsewhere, pairs.is_relevant))
    if slope <= 0 or gains.mean() <= _CLEAR * gains.std(ddof=1) / math.sqrt(len(gains)):
        raise DataError(
            f"the scores say nothing about these labels: calibrated on other queries they have a "
            f"log-loss of {after.log_loss:.4f}, the mere share of relevant documents has "
            f"{unread.mean():.4f}. Check the labels, the instruction and the model."
        )
    return Fit(1 / slope, bias, before, after)


def _refuse_separable(log_odds: Floats, is_relevant: npt.NDArray[np.bool_]) -> None:
    """Refuse judgments of all queries, or of four fifths, that a step fits best."""
    if log_odds[is_relevant].min() >= log_odds[~is_relevant].max():
        raise DataError(
            "every relevant document has higher log-odds than any irrelevant one, or all but a few "
            "have, so no finite temperature fits: only 0 and 1 do. Add harder candidates, such as "
            "mined negatives."
        )


def refuse_few(lists: Sequence[CandidateList]) -> None:
    """Refuse judgments that cannot carry two numbers.

    Raises:
        DataError: If too few queries have a relevant document, or an irrelevant one.
    """
    relevant = len({each.query for each in lists if any(each.labels or [])})
    irrelevant = len({each.query for each in lists if not all(each.labels or [1])})
    if min(relevant, irrelevant) < MIN_QUERIES:
        raise DataError(
            f"calibrating needs {MIN_QUERIES} queries with a relevant and {MIN_QUERIES} with an "
            f"irrelevant document, got {relevant} and {irrelevant} of "
            f"{len({each.query for each in lists})}. Judge more queries; pairs of one are too "
            "alike to stand for others."
        )


def quality(scored: ScoredSet) -> Quality:
    """Return log-loss and reliability of P = sigmoid(log-odds)."""
    pairs = _pairs(scored)
    losses = _losses(pairs.log_odds, pairs.is_relevant)
    return Quality(float(losses.mean()), metrics.reliability(scored))


def calibrated(scored: ScoredSet, by: Fit | Calibration) -> ScoredSet:
    """Return the set with log-odds whose sigmoid is the calibrated score."""
    return _with_log_odds(scored, _pairs(scored).log_odds / by.temperature + by.bias)


def curve(scored: ScoredSet) -> list[Precision]:
    """Return what each threshold on sigmoid(log-odds) keeps, as long as that is `MIN_KEPT`."""
    pairs = _pairs(scored)
    found = (_keep(pairs, float(threshold)) for threshold in _THRESHOLDS)
    return [each for each in found if each is not None and each.kept >= MIN_KEPT]


def lowest(thresholds: Sequence[Precision], precision: float) -> Precision | None:
    """Return the lowest threshold at which the precision is reached, None if none does."""
    return next((each for each in thresholds if each.precision >= precision), None)


def precision_at(scored: ScoredSet, threshold: float) -> Precision | None:
    """Return what a threshold on sigmoid(log-odds) keeps, None if it keeps nothing.

    The interval is Wilson's (1927) for as many independent pairs as the kept ones are worth: those
    of one query are alike, and Kish's design effect (1965) says how much. A bootstrap over queries
    is as wide in the middle, but has no width at all where every kept document is relevant.
    """
    return _keep(_pairs(scored), threshold)


def _keep(pairs: _Pairs, threshold: float) -> Precision | None:
    kept = pairs.log_odds >= math.log(threshold / (1 - threshold))
    if not kept.any():
        return None
    sizes = np.bincount(pairs.query[kept])
    hits = np.bincount(pairs.query[kept & pairs.is_relevant], minlength=len(sizes))
    low, high = _interval(hits[sizes > 0], sizes[sizes > 0])
    return Precision(
        score_threshold=threshold,
        kept=int(sizes.sum()),
        precision=float(hits.sum() / sizes.sum()),
        low=low,
        high=high,
        recall=float(hits.sum() / pairs.is_relevant.sum()),
    )


def _interval(hits: Counts, sizes: Counts) -> tuple[float, float]:
    """Return the interval of sum(hits) / sum(sizes), which are of queries."""
    total, queries = float(sizes.sum()), len(sizes)
    share = float(hits.sum()) / total
    if queries > 1 and 0 < share < 1:
        between = ((hits - share * sizes) ** 2).sum() * queries / (queries - 1) / total**2
        effect = max(float(between) * total / (share * (1 - share)), 1.0)
    else:  # nothing varies that could be measured: take each query's pairs as one
        effect = total / queries
    n = total / effect
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _losses(log_odds: Floats, is_relevant: npt.NDArray[np.bool_]) -> Floats:
    """Return -log P(what was judged) of each pair."""
    losses: Floats = np.logaddexp(0.0, log_odds) - is_relevant * log_odds
    return losses


def _pairs(scored: ScoredSet) -> _Pairs:
    numbers: dict[str, int] = {}  # one query may have several lists, as under two instructions
    queries = [numbers.setdefault(each.query, len(numbers)) for each in scored.lists]
    return _Pairs(
        np.concatenate([np.asarray(row, np.float64) for row in scored.log_odds]),
        np.concatenate([np.asarray(each.labels or [], np.int64) > 0 for each in scored.lists]),
        np.repeat(queries, [len(row) for row in scored.log_odds]),
    )


def _with_log_odds(scored: ScoredSet, log_odds: Floats) -> ScoredSet:
    ends = np.cumsum([len(row) for row in scored.log_odds])[:-1]
    return replace(scored, log_odds=[row.tolist() for row in np.split(log_odds, ends)])

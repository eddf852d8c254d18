"""What rankings of frozen candidate lists are worth, and whether two differ by more than chance.

Decides how metrics, comparisons, calibration and alarms are counted. Knows nothing of models: it
sees log-odds s = logit(yes) - logit(no) and labels, and P(yes) = sigmoid(s) in float64. Rankings
are of log-odds, never of P(yes), which rounds to ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from qwen3_reranker.data.candidates import LARGEST_LABEL, CandidateList
from qwen3_reranker.errors import InputError, MissingExtraError, shown

METRICS = ("nDCG@10", "MRR@10", "MAP", "R@10")
"""Names of what `measure` returns, the main one first."""

_TIE = 1e-9
"""Metric values closer than this are one value, computed in another order."""

MIN_DEVIATION = 0.0625
"""Log-odds. bfloat16 servers step by this much in [8, 16): a smaller spread drowns in rounding."""
MAX_CONSTANT = 0.1
"""Share of queries. Lists of duplicates are constant by right, but not one list in ten."""
MAX_SATURATED = 0.99
"""Share of documents. A sound reranker is sure of most of a hundred candidates, never of all."""
MAX_YES_EXCESS = 0.5
"""Mean P(yes) above the share of relevant documents; wide, as judgments miss relevant ones."""
MIN_YES_RATIO = 0.1
"""Mean P(yes) over the share of relevant documents; below, relevant ones get no yes either."""
_HIGH, _LOW = 0.999, 0.001

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ScoredSet:
    """Judged candidate lists with one model's log-odds of every candidate.

    Attributes:
        name: Name of the set.
        lists: Candidate lists, all labelled; a list without candidates needs no labels.
        log_odds: One row per list, aligned with its candidates.

    Raises:
        InputError: If there is nothing to measure, or scores do not fit the candidates.
    """

    name: str
    lists: Sequence[CandidateList]
    log_odds: list[list[float]]

    def __post_init__(self) -> None:
        if len(self.lists) != len(self.log_odds) or not any(self.log_odds):
            raise InputError(
                f"log_odds of '{self.name}' must hold one row per query and a score, got "
                f"{sum(map(len, self.log_odds))} scores in {len(self.log_odds)} rows for "
                f"{len(self.lists)} queries. Score every list of the set, and no other."
            )
        for i, (each, row) in enumerate(zip(self.lists, self.log_odds, strict=True)):
            _check_row(f"log_odds[{i}] of '{self.name}'", each, row)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of the same queries before and after.

    Attributes:
        mean_before, mean_after: Means over queries.
        difference: Mean of after - before.
        ci_low, ci_high: Ends of the difference's 95 % confidence interval.
        p_value: Chance of a difference as large if before and after were exchangeable.
        wins, ties, losses: Queries that got better, stayed as they were, got worse.
    """

    mean_before: float
    mean_after: float
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Documents whose P(yes) is in [low, high); the last bin holds 1.0 too.

    Attributes:
        low, high: Edges.
        count: Documents, at least one.
        mean_p_yes: Their mean P(yes).
        observed: Their share that is relevant.
    """

    low: float
    high: float
    count: int
    mean_p_yes: float
    observed: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """Whether P(yes) is the share of relevant documents.

    Attributes:
        ece: Expected calibration error: mean over documents of their bin's |P(yes) - observed|.
        bins: The bins that hold documents, ascending.
    """

    ece: float
    bins: list[ReliabilityBin]


@dataclass(frozen=True, slots=True)
class Spread:
    """How far scores lie apart.

    Attributes:
        deviation: Median of the queries' standard deviations of log-odds; None without pairs.
        constant: Share of queries with two documents or more that all have one score.
        high, low: Share of documents with P(yes) > 0.999, and < 0.001.
        mean_p_yes: Mean P(yes) over documents.
        relevant: Share of documents that are relevant.
    """

    deviation: float | None
    constant: float
    high: float
    low: float
    mean_p_yes: float
    relevant: float


def measure(scored: ScoredSet, *, relevant_from: int = 1) -> dict[str, list[float]]:
    """Return each of `METRICS` for every query, in the order of the lists.

    Counted by ir-measures (trec_eval's definitions; MRR@10 is MS MARCO's). Equal scores are ordered
    worst label first, so that a constant scorer is not credited with the order it was given.
    `missing_labels` are relevant documents that were never retrieved: they count in the ideal,
    in recall and in average precision. A query without relevant documents scores 0 and stays in.
    For MRR, MAP and recall labels from `relevant_from` on are relevant; nDCG has linear gain.

    Raises:
        MissingExtraError: Without ir-measures.
    """
    _check_at_least_1("relevant_from", relevant_from)
    try:
        import ir_measures
    except ImportError as error:
        raise MissingExtraError.of("measuring", error.name, "finetune") from error
    ndcg, rr, ap, recall = ir_measures.nDCG, ir_measures.RR, ir_measures.AP, ir_measures.R
    rel = relevant_from
    trec = {ndcg @ 10: "nDCG@10", ap(rel=rel): "MAP", recall(rel=rel) @ 10: "R@10"}
    qrels, run = _trec(scored)
    values = {name: [0.0] * len(scored.lists) for name in METRICS}
    marco = (ir_measures.msmarco, {rr(rel=rel) @ 10: "MRR@10"})  # trec_eval's RR has no cut
    for provider, names in ((ir_measures.pytrec_eval, trec), marco):
        for found in provider.iter_calc(list(names), qrels, run):
            values[names[found.measure]][int(found.query_id)] = float(found.value)
    return values


def heuristics(lists: Sequence[CandidateList]) -> dict[str, list[list[float]]]:
    """Return the scores of rankers that read nothing: a model must beat them to be worth its time.

    As the first stage gave them, and by characters. Where length wins, it gives labels away.
    """
    return {
        "given order": [[-float(i) for i in range(len(each.texts))] for each in lists],
        "shortest first": [[-float(len(text)) for text in each.texts] for each in lists],
        "longest first": [[float(len(text)) for text in each.texts] for each in lists],
    }


def compare(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, rounds: int = 10_000
) -> Comparison:
    """Compare a metric of the same queries before and after.

    The interval is the percentile interval of a paired bootstrap over queries (Efron and Tibshirani
    1993; narrow below some twenty queries). The p-value is of a two-sided paired randomisation test
    by sign flips (Smucker, Allan and Carterette 2007), the observed signs counted among the flips,
    so that it is never 0 (Phipson and Smyth 2010).

    Args:
        before: Metric of each query.
        after: The same queries, in the same order.
        seed: Same seed, same figures.
        rounds: Resamples of the one, flips of the other.

    Raises:
        InputError: If the two are not finite values of the same queries.

    Example:
        >>> compare([0.5, 0.25, 1.0], [0.5, 0.75, 1.0]).wins
        1
    """
    if not len(before) == len(after) > 0 or not np.isfinite([*before, *after]).all():
        raise InputError(
            "before and after must be finite values of the same queries, at least one, got "
            f"{len(before)} and {len(after)}. Measure the same lists twice."
        )
    differences = np.subtract(after, before, dtype=np.float64)  # (queries,)
    differences[np.abs(differences) <= _TIE] = 0.0
    rng = np.random.default_rng(seed)
    picks = (rng.integers(len(before), size=len(before)) for _ in range(rounds))
    low, high = np.quantile([differences[pick].mean() for pick in picks], [0.025, 0.975])
    return Comparison(
        mean_before=fmean(before),
        mean_after=fmean(after),
        difference=float(differences.mean()),
        ci_low=float(low),
        ci_high=float(high),
        p_value=_p_value(differences, rounds, rng),
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )


def reliability(scored: ScoredSet, bins: int = 10, relevant_from: int = 1) -> Reliability:
    """Compare P(yes) with the share of relevant documents, in bins of equal width.

    Expected calibration error of Guo et al. 2017 (arXiv 1706.04599), over retrieved documents.
    Relevant documents that nobody judged have label 0, and look like too much yes.
    """
    _check_at_least_1("bins", bins)
    p_yes, is_relevant = _documents(scored, relevant_from)
    place = np.minimum((p_yes * bins).astype(np.int64), bins - 1)
    filled = [
        ReliabilityBin(
            low=i / bins,
            high=(i + 1) / bins,
            count=int((place == i).sum()),
            mean_p_yes=float(p_yes[place == i].mean()),
            observed=float(is_relevant[place == i].mean()),
        )
        for i in np.unique(place).tolist()
    ]
    gaps = (each.count * abs(each.mean_p_yes - each.observed) for each in filled)
    return Reliability(ece=math.fsum(gaps) / len(p_yes), bins=filled)


def spread(scored: ScoredSet, *, relevant_from: int = 1) -> Spread:
    """Return how far scores lie apart within queries, and how P(yes) is distributed."""
    p_yes, is_relevant = _documents(scored, relevant_from)
    rows = [row for row in scored.log_odds if len(row) > 1]
    return Spread(
        deviation=float(np.median(list(map(np.std, rows)))) if rows else None,
        constant=fmean(min(row) == max(row) for row in rows) if rows else 0.0,
        high=float((p_yes > _HIGH).mean()),
        low=float((p_yes < _LOW).mean()),
        mean_p_yes=float(p_yes.mean()),
        relevant=float(is_relevant.mean()),
    )


def alarms(spread: Spread) -> list[str]:
    """Return what is wrong with a spread, in plain words; empty if nothing is."""
    found = []
    deviation = math.inf if spread.deviation is None else spread.deviation
    if spread.constant > MAX_CONSTANT or deviation < MIN_DEVIATION:
        found.append(
            f"Constant scores: {spread.constant:.0%} of the queries have one score for all "
            f"documents; scores of a query typically deviate by {deviation:.2g} in log-odds. The "
            "model hardly reads the documents. Lower the learning rate, and check that positives "
            "and negatives are not mixed up."
        )
    if spread.high + spread.low > MAX_SATURATED:
        found.append(
            f"Saturated scores: P(yes) is above {_HIGH} for {spread.high:.0%} and below {_LOW} for "
            f"{spread.low:.0%} of the documents, so that thresholds mean little. Train for fewer "
            "steps or at a lower learning rate."
        )
    is_yes = spread.mean_p_yes - spread.relevant > MAX_YES_EXCESS
    if is_yes or spread.mean_p_yes < spread.relevant * MIN_YES_RATIO:
        bias, negatives = ("Yes-bias", "more") if is_yes else ("No-bias", "fewer")
        found.append(
            f"{bias}: the mean P(yes) is {spread.mean_p_yes:.2g}, but {spread.relevant:.1%} of the "
            "documents are relevant. The order may be right, P(yes) is not. Train with "
            f"{negatives} negatives, and with the pointwise or hybrid loss."
        )
    return found


def _check_row(where: str, each: CandidateList, row: list[float]) -> None:
    if each.labels is None and each.texts:
        raise InputError(
            f"{where} is of a list without labels, of which nothing can be measured. Give each "
            "candidate of the set a label."
        )
    if len(row) != len(each.texts) or not all(map(math.isfinite, row)):
        raise InputError(
            f"{where} must hold one finite score per candidate, got {len(row)} for "
            f"{len(each.texts)}, {sum(not math.isfinite(value) for value in row)} of them NaN or "
            "infinite. Score the candidates in their order; check whether training diverged."
        )


def _check_at_least_1(name: str, value: int) -> None:
    if not 1 <= value <= LARGEST_LABEL:
        most = "" if value < 1 else f" and at most {LARGEST_LABEL}"
        raise InputError(
            f"{name} must be at least 1{most}, got {shown(value)}. Leave it out for the default."
        )


def _trec(scored: ScoredSet) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Return judgments and run, named by position because names in a file may repeat.

    Scores are places, -1 the first: trec_eval orders ties by name, and rounding makes new ones.
    """
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for i, (each, scores) in enumerate(zip(scored.lists, scored.log_odds, strict=True)):
        labels = each.labels or []
        order = sorted(range(len(labels)), key=lambda j: (-scores[j], labels[j]))
        qrels[str(i)] = {
            **{f"d{j}": label for j, label in enumerate(labels)},
            **{f"m{j}": label for j, label in enumerate(each.missing_labels)},
        }
        run[str(i)] = {f"d{j}": -float(place) for place, j in enumerate(order, 1)}
    return qrels, run


def _documents(scored: ScoredSet, relevant_from: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return P(yes) and relevance of all documents of a set, each (documents,)."""
    _check_at_least_1("relevant_from", relevant_from)
    log_odds = np.concatenate([np.asarray(row, np.float64) for row in scored.log_odds])
    labels = np.concatenate([np.asarray(each.labels or [], np.int64) for each in scored.lists])
    # Not 1 / (1 + exp(-s)), which overflows at s = -710.
    return np.exp(-np.logaddexp(0.0, -log_odds)), labels >= relevant_from


def _p_value(differences: Floats, rounds: int, rng: np.random.Generator) -> float:
    moved = differences[differences != 0]
    # A sum of the same numbers in another order may fall just short of the observed one.
    bound = abs(moved.sum()) - 1e-12 * np.abs(moved).sum()
    flips = (rng.integers(2, size=len(moved)) * 2 - 1 for _ in range(rounds))
    return (1 + sum(bool(abs(signs @ moved) >= bound) for signs in flips)) / (rounds + 1)

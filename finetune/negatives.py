"""Which candidates become negatives, and which are dropped because they may be relevant.

Decides what is excluded, in which order the rest is tried, and what a teacher's log-odds mean for
it. A passage that ranks high and is not labelled is often relevant all the same; as a negative it
would teach the opposite of what is wanted. The comparison is in log-odds: P(yes) saturates, and
0.999 beside 0.998 says nothing. Knows nothing of retrievers, models or files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

from qwen3_reranker.errors import InputError

from .data import TrainingGroup, normalised
from .retrieval import Corpus, Rankings

Judge: TypeAlias = Callable[[Sequence[TrainingGroup], Sequence[Sequence[str]]], list[list[float]]]
"""From queries and documents of each to log-odds, aligned: what a teacher is here."""

NEAR = "within the margin of the positives"
HIGH = "above max_log_odds"
LEFT_OUT = "the row has no negative and was left out"


@dataclass(frozen=True, slots=True)
class Mining:
    """How negatives are chosen.

    Attributes:
        num_negatives: Negatives that a row gets, at most, beside those it has.
        skip_top: First ranks that are never taken.
        depth: Last rank that is.
        margin: A candidate is dropped if its log-odds are not at least this much below the median
            of the row's positives. The lowest would let one positive that the teacher does not
            understand drop nearly everything, and the highest would let in what is as good as
            most (`benchmarks.mining` has figures).
        max_log_odds: A candidate with more is dropped in any case; None for no such limit.
        seed: Decides with the row's position which candidates are tried first.

    Raises:
        InputError: If a value cannot be used.
    """

    num_negatives: int = 7
    skip_top: int = 0
    depth: int = 50
    margin: float = 1.0
    max_log_odds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise InputError(
                f"--num_negatives must be at least 1, got {self.num_negatives}. Leave it out for "
                "the default."
            )
        if not 0 <= self.skip_top < self.depth:
            raise InputError(
                f"--skip_top must be at least 0 and less than --depth, got {self.skip_top} and "
                f"{self.depth}. Ranks skip_top + 1 to depth are taken."
            )
        for name in ("margin", "max_log_odds"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"--{name} must be a finite number of log-odds, got {value}.")
        if self.margin < 0:
            raise InputError(
                f"--margin must be at least 0, got {self.margin}. A negative one would keep what "
                "the teacher puts above a positive."
            )

    def reason(self, log_odds: float, positives: Sequence[float]) -> str | None:
        """Return why a candidate is dropped, given its log-odds and the positives', or None.

        Example:
            >>> Mining(margin=1).reason(3.5, [-2.0, 4.0, 9.0])
            'within the margin of the positives'
            >>> Mining(margin=1).reason(3.0, [-2.0, 4.0, 9.0]) is None
            True
        """
        if self.max_log_odds is not None and log_odds > self.max_log_odds:
            return HIGH
        return NEAR if log_odds > median(positives) - self.margin else None


@dataclass(slots=True)
class Pending:
    """A row while its negatives are sought.

    Attributes:
        row: Position in the training file, from 1.
        group: Query, and documents that are judged already.
        untried: Rank and place in the corpus of each candidate, the next one last.
        scores: Log-odds of the group's own documents; empty without a teacher.
        kept: Place and log-odds of each negative found.
        dropped: Lines of the review file.
        num_tried: Candidates looked at.
    """

    row: int
    group: TrainingGroup
    untried: list[tuple[int, int]]
    scores: list[float] = field(default_factory=list)
    kept: list[tuple[int, float]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    num_tried: int = 0

    def draw(self, count: int) -> list[tuple[int, int]]:
        """Take the next candidates."""
        drawn = [self.untried.pop() for _ in range(min(count, len(self.untried)))]
        self.num_tried += len(drawn)
        return drawn

    def about(self, **what: Any) -> dict[str, Any]:
        """Return a line of the review file: the row, and what is said about it."""
        of_row = {"row": self.row, "query": self.group.query, "instruction": self.group.instruction}
        return {**of_row, **what}


def candidates(
    groups: Sequence[TrainingGroup], corpus: Corpus, rankings: Rankings, mining: Mining
) -> list[Pending]:
    """Return what may be a negative of each row that has a positive, in the order of trial.

    Left out are the query itself, the row's own negatives, which it has already, and the positives
    of every row with this query, also under another instruction: nobody judged them under this one.
    """
    known: dict[str, set[str]] = {}
    for group in groups:
        of_query = known.setdefault(normalised(group.query), {normalised(group.query)})
        of_query.update(map(normalised, group.positive))
    pending = []
    for i, (group, ranking) in enumerate(zip(groups, rankings, strict=True)):
        taken = known[normalised(group.query)] | set(map(normalised, group.negative))
        window = list(enumerate(ranking, 1))[mining.skip_top : mining.depth]
        untried = [(rank, place) for rank, place in window if not corpus.forms(place) & taken]
        # Of strings, random.Random makes the same seed in every process.
        random.Random(f"{mining.seed} {i}").shuffle(untried)  # noqa: S311
        if group.positive:  # labelled pairs may have none, and then nothing to compare with
            pending.append(Pending(i + 1, group, untried))
    return pending


def find_negatives(
    pending: Sequence[Pending], corpus: Corpus, mining: Mining, judge: Judge | None
) -> None:
    """Try candidates until each row has its negatives or none are left; none is scored in vain."""
    if judge is not None:
        groups = [each.group for each in pending]
        own = judge(groups, [[*group.positive, *group.negative] for group in groups])
        for each, scores in zip(pending, own, strict=True):
            each.scores = _rounded(scores)
    waiting = list(pending)
    while waiting:
        drawn = [each.draw(mining.num_negatives - len(each.kept)) for each in waiting]
        if judge is None:
            log_odds = [[-math.inf] * len(row) for row in drawn]  # nothing is dropped
        else:
            texts = [[corpus.text(place) for _, place in row] for row in drawn]
            log_odds = [_rounded(row) for row in judge([each.group for each in waiting], texts)]
        for each, row, of_row in zip(waiting, drawn, log_odds, strict=True):
            _sort_out(each, row, of_row, corpus, mining)
        waiting = [
            each for each in waiting if each.untried and len(each.kept) < mining.num_negatives
        ]


def _sort_out(
    one: Pending,
    drawn: Sequence[tuple[int, int]],
    scores: Sequence[float],
    corpus: Corpus,
    mining: Mining,
) -> None:
    positives = one.scores[: len(one.group.positive)] or [math.inf]
    for (rank, place), log_odds in zip(drawn, scores, strict=True):
        reason = mining.reason(log_odds, positives)
        if reason is None:
            one.kept.append((place, log_odds))
        else:
            line = one.about(
                id=corpus.documents[place].id, document=corpus.text(place), rank=rank,
                reason=reason, log_odds=log_odds, positives=positives,
            )  # fmt: skip
            one.dropped.append(line)


def result(one: Pending, corpus: Corpus) -> dict[str, Any]:
    """Return a row's line of the training file, if it has one, and its lines of the review file."""
    group = one.group
    negatives = [*group.negative, *(corpus.text(place) for place, _ in one.kept)]
    row: dict[str, Any] = {"query": group.query, "positive": group.positive, "negative": negatives}
    if group.instruction is not None:
        row["instruction"] = group.instruction
    if one.scores:
        count = len(group.positive)
        of_negatives = [*one.scores[count:], *(log_odds for _, log_odds in one.kept)]
        row["scores"] = {"positive": one.scores[:count], "negative": of_negatives}
    review = list(one.dropped)
    if not negatives:
        review.append(one.about(reason=LEFT_OUT))
    return {
        "row": row if negatives else None,
        "review": review,
        "num_tried": one.num_tried,
        "num_kept": len(one.kept),
    }


def _rounded(log_odds: Sequence[float]) -> list[float]:
    """Return log-odds as they are written, so that a file explains every decision."""
    return [round(value, 4) for value in log_odds]

"""Candidate lists of a first stage, and how well an order of them is.

Decides what a row of a file means and how nDCG@10 is counted. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError, shown
from .documents import name_of
from .jsonl import parse_rows

LARGEST_LABEL = 2**31 - 1
"""Of a relevance; trec_eval keeps it in so many bits, and what is far larger is no float."""


@dataclass(frozen=True, slots=True)
class CandidateList:
    """One query with the documents a first stage found, best first.

    Attributes:
        query_id: Name of the query, or its line number.
        query: The query.
        instruction: Task sentence, or None.
        ids: Name of each document, or its position.
        texts: The documents.
        labels: Relevance of each document (0 none, larger better), or None without judgments.
        missing_labels: Relevance of relevant documents that were not found; part of the ideal.
    """

    query_id: str
    query: str
    instruction: str | None
    ids: list[str]
    texts: list[str]
    labels: list[int] | None
    missing_labels: list[int]

    def first(self, depth: int | None) -> CandidateList:
        """Return the first `depth` candidates, None for all; labels of the others are missing.

        Raises:
            InputError: If `depth` is below 1.

        Example:
            >>> candidates = CandidateList("1", "q", None, ["a", "b"], ["", ""], [0, 2], [1])
            >>> candidates.first(1).missing_labels
            [1, 2]
        """
        if depth is None:
            return self
        if depth < 1:
            raise InputError(
                f"depth must be at least 1 or None, got {shown(depth)}. Use None to keep "
                "every candidate."
            )
        kept = None if self.labels is None else self.labels[:depth]
        cut_off = [] if self.labels is None else [label for label in self.labels[depth:] if label]
        return replace(
            self,
            ids=self.ids[:depth],
            texts=self.texts[:depth],
            labels=kept,
            missing_labels=[*self.missing_labels, *cut_off],
        )


def read_candidate_rows(path: str) -> list[CandidateList]:
    """Read `{"query", "candidates": [{"text", "id"?, "label"?}], ...}` rows.

    Optional keys of a row: `query_id`, `instruction`, `missing_labels`. Labels are for all
    candidates of a row or for none.

    Raises:
        DataError: With every fault of the file, by line.
    """
    return parse_rows(path, _parse)


def ndcg_at_10(
    labels: Sequence[int], scores: Sequence[float], missing_labels: Sequence[int] = ()
) -> float:
    """Return nDCG@10 with linear gain; equal scores are ordered worst label first.

    Ties against the ranking keep a scorer that gives every document one score from being credited
    with the order in which the first stage delivered them. Definition: Järvelin and Kekäläinen
    2002, with log2 discount. A query without relevant documents scores 0.

    Example:
        >>> ndcg_at_10([0, 1], [0.2, 0.9]), round(ndcg_at_10([1, 0], [0.5, 0.5]), 4)
        (1.0, 0.6309)
    """
    order = sorted(range(len(labels)), key=lambda i: (-scores[i], labels[i]))
    ideal = _dcg(sorted([*labels, *missing_labels], reverse=True))
    return _dcg([labels[i] for i in order]) / ideal if ideal else 0.0


def _dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:10]))


def _parse(row: dict[str, Any], line: int) -> CandidateList:
    query = row.get("query")
    if not isinstance(query, str) or not query.strip():
        raise ValueError("'query' must be a string that is not blank")
    instruction = row.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"'instruction' must be a string, got {type(instruction).__name__}")
    candidates = row.get("candidates")
    if not isinstance(candidates, list):
        advice = "; this is a training row, for --train_file" if "positive" in row else ""
        raise ValueError(f"'candidates' must be a list of objects with 'text'{advice}")
    for i, candidate in enumerate(candidates):
        if not isinstance(candidate, dict) or not isinstance(candidate.get("text"), str):
            raise ValueError(f"candidates[{i}] must be an object with a string 'text'")
    labels = [candidate.get("label") for candidate in candidates]
    is_judged = bool(labels) and labels[0] is not None
    for i, label in enumerate(labels):
        if is_judged != (label is not None) or (is_judged and not _is_label(label)):
            raise ValueError(
                f"candidates[{i}] must have a whole 'label' from 0 to {LARGEST_LABEL} like the "
                "others, or none"
            )
    missing = row.get("missing_labels", [])
    if not isinstance(missing, list) or not all(_is_label(label) for label in missing):
        raise ValueError(
            f"'missing_labels' must be a list of whole numbers from 0 to {LARGEST_LABEL}"
        )
    return CandidateList(
        query_id=name_of(row, "query_id", line),
        query=query,
        instruction=instruction,
        ids=[name_of(candidate, "id", i) for i, candidate in enumerate(candidates)],
        texts=[candidate["text"] for candidate in candidates],
        labels=labels if is_judged else None,
        missing_labels=missing,
    )


def _is_label(value: Any) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and 0 <= value <= LARGEST_LABEL

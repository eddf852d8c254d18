"""Scores for columns of pairs, a batch at a time, in the actors of a data engine.

Decides what a batch holds and what is added to it. Knows nothing of the engine: Ray Data calls it
with NumPy columns, a loop over Parquet batches with lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import inputs
from .errors import DocumentTooLargeError, InputError, NonFiniteScoreError
from .jobs import rows_by
from .reranker import Reranker

NEEDED = ("query", "document")
ADDED = ("score", "log_odds", "truncated")


class BulkScorer:
    """Adds scores to batches of (query, document) pairs; the class that `map_batches` takes.

    The model is loaded by the constructor, once per actor. Equal queries of a batch are read once,
    so rows sorted by query are scored fastest, in batches of a thousand or more.

    Args:
        model: As `Reranker`.
        settings: Keywords of `Reranker`.

    Raises:
        InputError: If a setting has the wrong type or value.
        ModelLoadError: If the model cannot be loaded.

    Example:
        >>> scorer = BulkScorer(model_folder)
        >>> batch = scorer({"query": ["tea"] * 2, "document": ["green tea", "rain"]})
        >>> list(batch)
        ['query', 'document', 'score', 'log_odds', 'truncated']
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self._reranker = Reranker(model, **settings)
        _ = self._reranker.loaded  # a model that does not load fails its actor, not the first batch

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return the batch with its scores; arguments and errors are those of `score_columns`."""
        return score_columns(self._reranker, batch)


def score_columns(reranker: Reranker, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return a batch with P("yes"), log-odds, and whether a document's end was cut.

    Args:
        reranker: What scores.
        batch: Columns `query`, `document` and perhaps `instruction`, in which None stands for the
            default; others are passed through.

    Raises:
        InputError: If a column is missing or would be overwritten, or a row is no pair of texts
            that fits; rows of the batch are pairs in it.
        Qwen3RerankerError: As `Reranker.rank`.
    """
    _check_columns(batch)
    queries, documents, positions = _group(batch)
    try:
        rankings = reranker.rank_many(
            [query for _, query in queries],
            documents,
            instruction=[instruction for instruction, _ in queries],
        )
    except (InputError, DocumentTooLargeError, NonFiniteScoreError) as error:
        raise type(error)(_name_rows(str(error), positions)) from error
    num_rows = len(batch["query"])
    scores, log_odds = np.empty(num_rows), np.empty(num_rows)
    truncated = np.empty(num_rows, bool)
    for ranking, rows in zip(rankings, positions, strict=True):
        for result in ranking:
            row = rows[result.index]
            scores[row], log_odds[row] = result.score, result.log_odds
            truncated[row] = result.truncated
    return {**batch, "score": scores, "log_odds": log_odds, "truncated": truncated}


def _check_columns(batch: Mapping[str, Sequence[Any]]) -> None:
    missing = [name for name in NEEDED if name not in batch]
    if missing:
        raise InputError(
            f"a batch needs the columns query and document, {' and '.join(missing)} is missing of "
            f"{', '.join(batch) or 'none'}. Rename the columns first."
        )
    taken = [name for name in ADDED if name in batch]
    if taken:
        raise InputError(
            f"a batch has a column {taken[0]} already, which would be overwritten. Rename it first."
        )


def _group(
    batch: Mapping[str, Sequence[Any]],
) -> tuple[list[tuple[str | None, str]], list[list[str]], list[list[int]]]:
    """Return the distinct (instruction, query)s, the documents of each, and their rows."""
    pairs = inputs.pairs(zip(batch["query"], batch["document"], strict=True))
    given = list(batch["instruction"]) if "instruction" in batch else None
    instructions = inputs.instructions(given, len(pairs))
    rows = rows_by(zip(instructions, (query for query, _ in pairs), strict=True))
    documents = [[pairs[row][1] for row in group] for group in rows.values()]
    return list(rows), documents, list(rows.values())


def _name_rows(message: str, positions: Sequence[Sequence[int]]) -> str:
    """Return a message that names rows of the batch instead of places in what was made of it."""

    def name(found: re.Match[str]) -> str:
        places = [int(place) for place in found.groups()[1:] if place is not None]
        if len(positions) == 1:  # the only query's number is not told
            places.insert(0, 0)
        query, document = (*places, 0)[:2]
        kind = "query" if found[1] == "queries" else "document"
        return f"{kind} of pairs[{positions[query][document]}]"

    return re.sub(r"(queries|documents)\[(\d+)\](?:\[(\d+)\])?", name, message)

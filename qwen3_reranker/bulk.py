"""Scores for columns of pairs, a batch at a time, in the actors of a data engine.

Decides what a batch holds and what is added to it. Knows nothing of the engine: Ray Data calls it
with NumPy columns, a loop over Parquet batches with lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import InputError
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
    pairs = list(zip(batch["query"], batch["document"], strict=True))
    given = list(batch["instruction"]) if "instruction" in batch else None
    job = reranker._job_of_pairs(pairs, given, None)
    scored = reranker._score(job)
    return {
        **batch,
        "score": np.array(job.in_rows(scored.scores), float),
        "log_odds": np.array(job.in_rows(scored.log_odds), float),
        "truncated": np.array(job.in_rows(scored.truncated), bool),
    }


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

"""Scores for columns of pairs, a batch at a time, in the actors of a data engine.

Decides what a batch holds and what is added to it. Knows nothing of the engine: Ray Data calls it
with NumPy columns, a loop over Parquet batches with lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .call import arguments
from .call.job import rows_by
from .errors import DocumentTooLargeError, InputError, NonFiniteScoreError, named
from .reranker import Reranker

NEEDED = ("query", "document")
INSTRUCTION = "instruction"
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
        InputError: If a column is missing, would be overwritten, is no list of texts or has
            another length, or a row is no pair of texts that fits; rows of the batch are pairs in
            it.
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
    num_rows = sum(map(len, positions))
    scores, log_odds = np.empty(num_rows), np.empty(num_rows)
    truncated = np.empty(num_rows, bool)
    for ranking, rows in zip(rankings, positions, strict=True):
        for result in ranking:
            row = rows[result.index]
            scores[row], log_odds[row] = result.score, result.log_odds
            truncated[row] = result.truncated
    return {**batch, "score": scores, "log_odds": log_odds, "truncated": truncated}


def _check_columns(batch: Mapping[str, Sequence[Any]]) -> None:
    if not hasattr(type(batch), "keys"):
        raise InputError(
            f"a batch must map names to columns, got {type(batch).__name__}. Pass a dict with the "
            "columns query and document."
        )
    missing = [name for name in NEEDED if name not in batch]
    if missing:
        present = ", ".join(name if type(name) is str else named(name) for name in batch)
        raise InputError(
            f"a batch needs the columns query and document, {' and '.join(missing)} is missing of "
            f"{present or 'none'}. Rename the columns first."
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
    columns = {name: _column(batch, name) for name in (*NEEDED, INSTRUCTION) if name in batch}
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{len(column)} of {name}" for name, column in columns.items())
        raise InputError(
            f"the columns of a batch must have one length, got {lengths}. A row is one of each; "
            "pass columns of one table."
        )
    pairs = arguments.check_pairs(zip(columns["query"], columns["document"], strict=True))
    instructions = arguments.check_instructions(columns.get(INSTRUCTION), len(pairs))
    rows = rows_by(zip(instructions, (query for query, _ in pairs), strict=True))
    documents = [[pairs[row][1] for row in group] for group in rows.values()]
    return list(rows), documents, list(rows.values())


def _column(batch: Mapping[str, Sequence[Any]], name: str) -> list[Any]:
    if not hasattr(type(batch[name]), "__len__"):  # reading it would leave nothing to pass through
        raise InputError(
            f"column {name} must be a list of strings, got {type(batch[name]).__name__}. Pass a "
            "list or an array, which can be read twice."
        )
    return arguments.check_sequence(batch[name], f"column {name}", "strings")


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

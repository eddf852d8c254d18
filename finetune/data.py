"""Training files: which groups they hold, what is refused, and what leaks into an evaluation.

Decides how files and hub data sets are read, that every row is accepted or rejected with a reason,
and what contradicts what across rows. Knows nothing of tokens or losses; `datasets` is imported for
Parquet and hub names alone, because it guesses types and mistakes JSON lines without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from statistics import median
from typing import Any

from qwen3_reranker.data.candidates import LARGEST_LABEL, CandidateList
from qwen3_reranker.data.jsonl import Faults, Row, read_rows
from qwen3_reranker.errors import DataError, InputError, MissingExtraError, shown

from .layouts import OURS, PAIRS, Defaults, Layout, TrainingGroup, parse, recognise

__all__ = [
    "TrainingFile",
    "TrainingGroup",
    "check_leaks",
    "describe",
    "normalised",
    "read_training_file",
]

HUB = "hf://"


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """What a file holds, row for row.

    Attributes:
        path: As it was given.
        sha256: Of the file's bytes; of a hub data set, of its rows as sorted JSON lines.
        num_lines: Lines that are not blank; rows of a Parquet file or data set.
        groups: What to train on, in order of first appearance.
        rejected: "file:line: reason" of each row that was refused.
        num_rows: Accepted rows; with the rejected they are `num_lines`.
    """

    path: str
    sha256: str
    num_lines: int
    groups: list[TrainingGroup]
    rejected: list[str]
    num_rows: int


def read_training_file(
    path: str,
    *,
    instruction: str | None = None,
    relevant_from: int = 1,
    skip_bad: bool = False,
    needs_negatives: bool = True,
) -> TrainingFile:
    """Read training rows of one of four layouts, or report every fault of the file.

    The layouts: `{"query", "positive": [...], "negative": [...], "instruction"?, "scores"?:
    {"positive": [...], "negative": [...]}}`; labelled pairs `{"query", "document", "label",
    "instruction"?}`, which become one group per query and instruction; ms-swift's `{"messages",
    "positive_messages", "negative_messages"}`; FlagEmbedding's `{"query", "pos", "neg",
    "pos_scores"?, "neg_scores"?, "prompt"?}`.

    Args:
        path: JSON lines, plain, .gz or .xz; a .parquet file; or `hf://NAME[:SPLIT]`, by default
            the split `train`.
        instruction: Task sentence of rows that give none.
        relevant_from: Smallest graded label of a pair that is relevant; "yes" and true always are.
        skip_bad: Go on without faulty rows. Of rows that contradict each other the first stays.
        needs_negatives: Refuse rows without negatives, as nothing can be learnt from them alone.

    Raises:
        DataError: If the file cannot be read, has no rows, or has faults that are not skipped.
        MissingExtraError: If `datasets` is needed and not installed.
    """
    if not 1 <= relevant_from <= LARGEST_LABEL:
        raise InputError(
            f"relevant_from must be at least 1 and at most {LARGEST_LABEL}, got "
            f"{shown(relevant_from)}. Label 0 is never relevant."
        )
    rows, sha256 = _open(path)
    collector = _Collector(Defaults(instruction, relevant_from, needs_negatives))
    num_lines, rejected, faults = 0, [], Faults(path)
    for row in rows:
        num_lines += 1
        try:
            if row.content is None:
                raise ValueError(row.fault)
            collector.add(row.content, row.line)
        except ValueError as error:
            fault = f"{path}:{row.line}: {error}"
            faults.add(fault)
            if skip_bad:
                rejected.append(fault)
    if not num_lines:
        raise DataError(f"0 rows in {path}. Pass a file with one JSON object per line.")
    if faults and (not skip_bad or len(faults) == num_lines):
        raise faults.error()
    num_rows = num_lines - len(faults)
    return TrainingFile(path, sha256, num_lines, collector.groups, rejected, num_rows)


def check_leaks(
    train: Sequence[TrainingGroup], evaluation: Mapping[str, Sequence[CandidateList]]
) -> list[str]:
    """Say what of each evaluation set was trained on: counts, and names of up to three queries.

    Queries, and documents of the same query, are compared apart from case, spacing and
    compatibility forms; documents of other queries letter by letter. A corpus that both sides
    share makes the latter common; the same query on both sides makes an evaluation worthless.
    """
    positives: dict[str, set[str]] = {}
    for group in train:
        known = positives.setdefault(normalised(group.query), set())
        known.update(map(normalised, group.positive))
    texts = {document for group in train for document in group.positive}
    messages = []
    for name, lists in evaluation.items():
        queries = [each.query_id for each in lists if normalised(each.query) in positives]
        same, other = [], []
        for each in lists:
            of_query = positives.get(normalised(each.query), set())
            for document in _relevant(each):
                if normalised(document) in of_query:
                    same.append(each.query_id)
                elif document in texts:
                    other.append(each.query_id)
        for ids, what in (
            (queries, f"of {len(lists)} queries stand in training"),
            (same, "relevant documents are training positives of the same query"),
            (other, "relevant documents are training positives of other queries"),
        ):
            if ids:
                examples = ", ".join(list(dict.fromkeys(ids))[:3])
                messages.append(f"{name}: {len(ids)} {what} (query_id {examples})")
    return messages


def describe(groups: Sequence[TrainingGroup]) -> list[str]:
    """Return a few lines of counts; queries are compared as by `check_leaks`."""
    if not groups:
        return ["0 queries"]
    queries = Counter(normalised(group.query) for group in groups)
    repeated = sum(count > 1 for count in queries.values())
    own = [group.instruction for group in groups if group.instruction is not None]
    lines = [
        f"{len(queries)} queries in {len(groups)} groups, {repeated} of them in more than one",
        _spread("positives", [len(group.positive) for group in groups]),
        _spread("negatives", [len(group.negative) for group in groups]),
        f"{len(set(own))} own instructions, in {len(own)} groups",
    ]
    for kind in ("positive", "negative"):
        lacking = sum(not getattr(group, kind) for group in groups)
        if lacking:
            lines.append(f"{lacking} groups without a {kind}")
    return lines


def normalised(text: str) -> str:
    """Return what two texts share that differ in case, spacing and compatibility forms alone."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class _Collector:
    """The groups of a file so far, and on which line a document was given to a query."""

    def __init__(self, defaults: Defaults) -> None:
        self.groups: list[TrainingGroup] = []
        self._defaults = defaults
        self._layout: Layout = OURS
        self._first_line = 0  # of the layout; until a row is accepted it is a guess
        self._pairs: dict[tuple[str, str | None], TrainingGroup] = {}
        self._lines: dict[tuple[str, str | None], tuple[dict[str, int], dict[str, int]]] = {}

    def add(self, content: dict[str, Any], line: int) -> None:
        """Take a row in; raise ValueError, and change nothing, if it is refused."""
        layout = recognise(content, self._layout)
        if self._first_line and layout is not self._layout:
            raise ValueError(
                f"the row is {layout.name}, but line {self._first_line} is {self._layout.name}; "
                "keep one layout per file"
            )
        group = parse(content, layout, self._defaults)
        self._note_lines(group, layout, line)
        if not self._first_line:
            self._layout, self._first_line = layout, line
        if layout is PAIRS:
            self._merge(group)
        else:
            self.groups.append(group)

    def _note_lines(self, group: TrainingGroup, layout: Layout, line: int) -> None:
        # To another instruction the same document may well be of another relevance.
        key = (group.query, group.instruction)
        positive, negative = self._lines.setdefault(key, ({}, {}))
        sides = (
            (group.positive, positive, negative, layout.places[0]),
            (group.negative, negative, positive, layout.places[1]),
        )
        for documents, same, opposite, place in sides:
            for i, document in enumerate(documents):
                if document in opposite:
                    other = "relevant" if opposite is positive else "irrelevant"
                    where = "'document'" if layout is PAIRS else f"{place}[{i}]"
                    raise ValueError(
                        f"{where} is {other} to the same query on line {opposite[document]}; "
                        "decide, or take it out"
                    )
                if layout is PAIRS and document in same:
                    raise ValueError(f"the pair of line {same[document]} again; give it once")
        for documents, same, _, _ in sides:
            for document in documents:
                same.setdefault(document, line)

    def _merge(self, pair: TrainingGroup) -> None:
        key = (pair.query, pair.instruction)
        if key not in self._pairs:
            self._pairs[key] = pair
            self.groups.append(pair)
        else:
            self._pairs[key].positive.extend(pair.positive)
            self._pairs[key].negative.extend(pair.negative)


def _open(path: str) -> tuple[Iterable[Row], str]:
    """Return the rows of a file or data set, and its hash."""
    if path.startswith(HUB):
        rows = list(_dataset_rows(path))
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row.content, sort_keys=True, default=str).encode() + b"\n")
        return rows, digest.hexdigest()
    if not os.path.isfile(path):  # a pipe could not be read twice
        raise DataError(
            f"{path} cannot be read: it is not a file. Pass a .jsonl file, plain, .gz or .xz, a "
            f".parquet file, or {HUB}NAME:SPLIT."
        )
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the file.") from error
    return _dataset_rows(path) if path.endswith(".parquet") else read_rows(path), sha256


def _dataset_rows(path: str) -> Iterator[Row]:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError.of(f"reading {path}", error.name, "finetune") from error
    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        if path.startswith(HUB):
            rows = datasets.load_dataset(name, split=split or "train")
        else:
            # Streaming leaves no copy in a cache. Names are taken as patterns; without a size of
            # batches it fails at a table without rows.
            rows = datasets.load_dataset(
                "parquet", data_files=escape(path), split="train", streaming=True, batch_size=1000
            )
        for number, row in enumerate(rows, 1):
            yield Row(number, _without_nulls(row))
    except Exception as error:  # of many libraries; whichever, there are no more rows
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"{path} cannot be loaded: {type(error).__name__}: {reason}. Check name and split."
        ) from error


def _without_nulls(value: Any) -> Any:
    """Drop null fields: a table has every column in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _relevant(candidates: CandidateList) -> Iterator[str]:
    for document, label in zip(candidates.texts, candidates.labels or (), strict=False):
        if label > 0:
            yield document


def _spread(what: str, counts: Sequence[int]) -> str:
    return (
        f"{sum(counts)} {what}; per group {min(counts)} min, {median(counts):g} median, "
        f"{max(counts)} max"
    )

"""Training rows: one query with its relevant and its irrelevant documents.

Decides what a valid row is. Knows nothing of tokens or losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen3_reranker.jsonl import parse_rows

_KEYS = {"query", "positive", "negative", "instruction"}


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """One query and its documents.

    Attributes:
        query: The query.
        positive: Relevant documents, at least one.
        negative: Irrelevant documents, at least one.
        instruction: Task sentence, or None for the template's.
    """

    query: str
    positive: list[str]
    negative: list[str]
    instruction: str | None


def read_groups(path: str) -> list[TrainingGroup]:
    """Read the rows of a JSONL file.

    Raises:
        DataError: With every fault of the file, by line.
    """
    return parse_rows(path, _parse)


def _parse(row: dict[str, Any], line: int) -> TrainingGroup:
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0][:40]!r}; rows have {', '.join(sorted(_KEYS))}")
    query, instruction = row.get("query"), row.get("instruction")
    if not isinstance(query, str) or not query.strip():
        raise ValueError("'query' must be a string that is not blank")
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"'instruction' must be a string, got {type(instruction).__name__}")
    positive, negative = (_documents(row, key) for key in ("positive", "negative"))
    if set(positive) & set(negative):
        raise ValueError("a document is both positive and negative")
    return TrainingGroup(query, positive, negative, instruction)


def _documents(row: dict[str, Any], key: str) -> list[str]:
    documents = row.get(key)
    if not isinstance(documents, list) or not documents:
        raise ValueError(f"{key!r} must be a list of at least one string")
    for i, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(f"{key}[{i}] must be a string, got {type(document).__name__}")
    return documents

"""Layouts of training rows: our own, labelled pairs, ms-swift's and FlagEmbedding's.

Decides what a row of each means and what of it is refused. Knows nothing of files or other rows.
Refusals are ValueErrors; they name keys, positions and types, never a text.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_reranker.errors import named


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """One query and its documents; of labelled pairs, either list may be empty.

    Attributes:
        query: The query.
        positive: Relevant documents.
        negative: Irrelevant documents.
        instruction: Task sentence, or None for the template's.
        scores: Log-odds a teacher gave, of the positives, then of the negatives, or None.
    """

    query: str
    positive: list[str]
    negative: list[str]
    instruction: str | None
    scores: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """What rows do not say themselves.

    Attributes:
        instruction: Task sentence of rows that give none.
        relevant_from: Smallest graded label that is relevant.
        needs_negatives: Whether a row must have negatives; of labelled pairs none must.
    """

    instruction: str | None = None
    relevant_from: int = 1
    needs_negatives: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write rows.

    Attributes:
        name: The keys that must be there, as a reader knows them.
        keys: Every key a row may have.
        places: Keys of the positive and of the negative documents.
        read: Makes a group of a row that has no other keys; raises ValueError.
    """

    name: str
    keys: frozenset[str]
    places: tuple[str, str]
    read: Callable[[dict[str, Any], Defaults], TrainingGroup]

    def count_own_keys(self, row: dict[str, Any]) -> int:
        """Return how many keys of a row speak for this layout."""
        return len((self.keys - {"query", "instruction"}) & row.keys())


def recognise(row: dict[str, Any], preferred: Layout) -> Layout:
    """Return the layout that a row has most keys of; in doubt the preferred one."""
    return max((preferred, *LAYOUTS), key=lambda layout: layout.count_own_keys(row))


def parse(row: dict[str, Any], layout: Layout, defaults: Defaults) -> TrainingGroup:
    """Return the group a row means; a labelled pair is a group of one document.

    Raises:
        ValueError: If the row must not be trained on.
    """
    _refuse_unknown(row, layout.keys)
    group = layout.read(row, defaults)
    _refuse_repeats(group, layout.places)
    return group


def _read_lists(row: dict[str, Any], defaults: Defaults) -> TrainingGroup:
    query, instruction = _query(row), _instruction(row, "instruction", defaults)
    positive = _documents(row, "positive")
    negative = _documents(row, "negative", is_needed=defaults.needs_negatives)
    scores = row.get("scores")
    if scores is not None:
        if not isinstance(scores, dict):
            raise ValueError(
                "'scores' must be an object with the lists 'positive' and 'negative', "
                f"got {_kind(scores)}"
            )
        _refuse_unknown(scores, {"positive", "negative"})
        scores = [
            *_scores(scores.get("positive"), "scores.positive", len(positive)),
            *_scores(scores.get("negative"), "scores.negative", len(negative)),
        ]
    return TrainingGroup(query, positive, negative, instruction, scores)


def _read_pair(row: dict[str, Any], defaults: Defaults) -> TrainingGroup:
    query, instruction = _query(row), _instruction(row, "instruction", defaults)
    document = _text(row.get("document"), "'document'")
    if _is_relevant(row.get("label"), defaults.relevant_from):
        return TrainingGroup(query, [document], [], instruction)
    return TrainingGroup(query, [], [document], instruction)


def _read_messages(row: dict[str, Any], defaults: Defaults) -> TrainingGroup:
    system, query = _messages(row.get("messages"), "messages", ("user",))
    instruction = defaults.instruction if system is None else system
    positive, negative = (
        _message_documents(row, key, instruction, is_needed=is_needed)
        for key, is_needed in (
            ("positive_messages", True),
            ("negative_messages", defaults.needs_negatives),
        )
    )
    return TrainingGroup(query, positive, negative, instruction)


def _read_flag_embedding(row: dict[str, Any], defaults: Defaults) -> TrainingGroup:
    query, instruction = _query(row), _instruction(row, "prompt", defaults)
    positive = _documents(row, "pos")
    negative = _documents(row, "neg", is_needed=defaults.needs_negatives)
    scores = None
    if row.get("pos_scores") is not None or row.get("neg_scores") is not None:
        scores = [
            *_scores(row.get("pos_scores"), "pos_scores", len(positive)),
            *_scores(row.get("neg_scores"), "neg_scores", len(negative)),
        ]
    return TrainingGroup(query, positive, negative, instruction, scores)


OURS = Layout(
    name="query/positive/negative",
    keys=frozenset({"query", "positive", "negative", "instruction", "scores"}),
    places=("positive", "negative"),
    read=_read_lists,
)
PAIRS = Layout(
    name="query/document/label",
    keys=frozenset({"query", "document", "label", "instruction"}),
    places=("document", "document"),
    read=_read_pair,
)
# https://swift.readthedocs.io/en/v3.9/BestPractices/Reranker.html
MS_SWIFT = Layout(
    name="messages/positive_messages/negative_messages",
    keys=frozenset({"messages", "positive_messages", "negative_messages"}),
    places=("positive_messages", "negative_messages"),
    read=_read_messages,
)
# https://github.com/FlagOpen/FlagEmbedding/tree/master/examples/finetune/reranker
# The last four keys are for its own loaders and say nothing about relevance.
FLAG_EMBEDDING = Layout(
    name="query/pos/neg",
    keys=frozenset({"query", "pos", "neg", "pos_scores", "neg_scores", "prompt"})
    | {"id", "type", "pos_id", "neg_id"},
    places=("pos", "neg"),
    read=_read_flag_embedding,
)
LAYOUTS = (OURS, PAIRS, MS_SWIFT, FLAG_EMBEDDING)


def _query(row: dict[str, Any]) -> str:
    return _text(row.get("query"), "'query'")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        kind = "a blank one" if isinstance(value, str) else _kind(value)
        raise ValueError(f"{name} must be a string that is not blank, got {kind}")
    return value


def _instruction(row: dict[str, Any], key: str, defaults: Defaults) -> str | None:
    value = row.get(key)
    if value is None:
        return defaults.instruction
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string, got {_kind(value)}")
    return value  # an empty one is taken literally, as the core does


def _items(row: dict[str, Any], key: str, of: str, is_needed: bool) -> list[Any]:
    items = row.get(key)
    if not is_needed and (items is None or items == []):
        return []
    if not isinstance(items, list) or not items:
        kind = "an empty one" if isinstance(items, list) else _kind(items)
        raise ValueError(f"{key!r} must be a list of at least one {of}, got {kind}")
    return items


def _documents(row: dict[str, Any], key: str, *, is_needed: bool = True) -> list[str]:
    items = _items(row, key, "string", is_needed)
    return [_text(item, f"{key}[{i}]") for i, item in enumerate(items)]


def _scores(value: object, name: str, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        kind = str(len(value)) if isinstance(value, list) else _kind(value)
        raise ValueError(f"{name} must be a list of {count}, a score per document, got {kind}")
    for i, score in enumerate(value):
        if not _is_finite(score):
            raise ValueError(f"{name}[{i}] must be a finite number, got {_kind(score)}")
    return [float(score) for score in value]


def _is_finite(value: object) -> bool:
    # NaN compares false; a whole number too large for a float must not reach float().
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _is_relevant(label: object, relevant_from: int) -> bool:
    if isinstance(label, bool):
        return label
    if isinstance(label, int) and label >= 0:
        return label >= relevant_from
    if label == "yes" or label == "no":
        return label == "yes"
    kind = "another string" if isinstance(label, str) else _kind(label)
    raise ValueError(
        f"'label' must be yes or no, true or false, or a whole number of at least 0, got {kind}"
    )


def _message_documents(
    row: dict[str, Any], key: str, instruction: str | None, *, is_needed: bool
) -> list[str]:
    documents = []
    for i, item in enumerate(_items(row, key, "list of messages", is_needed)):
        system, document = _messages(item, f"{key}[{i}]", ("assistant", "user"))
        if system is not None and system != instruction:
            raise ValueError(
                f"{key}[{i}] has a system message that is not the row's; a group has one "
                "instruction. Move it into 'messages', or give its documents a row of their own"
            )
        documents.append(document)
    return documents


def _messages(value: object, name: str, roles: Sequence[str]) -> tuple[str | None, str]:
    """Return the system message, if there is one, and the one message that must follow."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{name} must be a list of objects with 'role' and 'content'")
    for message in value:
        _refuse_unknown(message, {"role", "content"})
    has_system = bool(value) and value[0].get("role") == "system"
    if len(value) != 1 + has_system or value[-1].get("role") not in roles:
        raise ValueError(
            f"{name} must be one message of role {' or '.join(roles)}, after at most one of role "
            "system"
        )
    text = _text(value[-1].get("content"), f"{name}[{len(value) - 1}].content")
    if not has_system:
        return None, text
    system = value[0].get("content")
    if not isinstance(system, str):
        raise ValueError(f"{name}[0].content must be a string, got {_kind(system)}")
    return system, text


def _refuse_unknown(content: dict[str, Any], keys: Collection[str]) -> None:
    unknown = sorted(set(content) - set(keys))
    if "candidates" in unknown:
        raise ValueError("'candidates' is a key of evaluation rows; pass this file as --eval_file")
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(keys), n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(keys))}"
        raise ValueError(f"unknown key {named(unknown[0])}; {advice}")


def _refuse_repeats(group: TrainingGroup, places: tuple[str, str]) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for key, documents in zip(places, (group.positive, group.negative), strict=True):
        for i, document in enumerate(documents):
            first, position = seen.setdefault(document, (key, i))
            if first != key:
                raise ValueError(
                    f"{key}[{i}] is {first}[{position}] too; a document is relevant or it is not"
                )
            if position != i:
                raise ValueError(f"{key}[{i}] repeats {key}[{position}]; give a document once")


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, float) and not _is_finite(value):
        return str(value)
    return type(value).__name__

"""What a training file may hold."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data import (
    TrainingFile,
    TrainingGroup,
    read_training_file,
)
from qwen3_reranker import InputError
from tests.training_files import FLAG, OURS, PAIR, SWIFT, answer, parquet, system, write

ROOT = Path(__file__).parents[2]


def test_ours_takes_every_key(tmp_path: Path) -> None:
    scores = {"positive": [2], "negative": [-1.5, 0]}
    path = write(
        tmp_path, {**OURS, "instruction": "Find law"}, {**OURS, "query": "r", "scores": scores}
    )
    assert read_training_file(path).groups == [
        TrainingGroup("q", ["yes"], ["no", "never"], "Find law"),
        TrainingGroup("r", ["yes"], ["no", "never"], None, [2.0, -1.5, 0.0]),
    ]


SCORED = TrainingGroup("q", ["yes"], ["no", "never"], "Find law", [3.0, -1.0, 0.5])
UNSCORED = TrainingGroup("q", ["yes"], ["no", "never"], "Find law")
SAME_IN_EVERY_LAYOUT: list[tuple[list[dict[str, Any]], TrainingGroup]] = [
    ([{**OURS, "instruction": "Find law"}], UNSCORED),
    (
        [
            {"query": "q", "document": "yes", "label": "yes", "instruction": "Find law"},
            {"query": "q", "document": "no", "label": "no", "instruction": "Find law"},
            {"query": "q", "document": "never", "label": "no", "instruction": "Find law"},
        ],
        UNSCORED,
    ),
    ([{**SWIFT, "messages": [system("Find law"), *SWIFT["messages"]]}], UNSCORED),
    ([{**FLAG, "prompt": "Find law"}], UNSCORED),
    (
        [
            {
                **OURS,
                "instruction": "Find law",
                "scores": {"positive": [3.0], "negative": [-1.0, 0.5]},
            }
        ],
        SCORED,
    ),
    ([{**FLAG, "prompt": "Find law", "pos_scores": [3.0], "neg_scores": [-1.0, 0.5]}], SCORED),
]
LAYOUT_NAMES = ["ours", "pairs", "ms-swift", "FlagEmbedding", "ours scored", "FlagEmbedding scored"]


@pytest.mark.parametrize(("rows", "group"), SAME_IN_EVERY_LAYOUT, ids=LAYOUT_NAMES)
def test_every_layout_says_the_same(
    tmp_path: Path, rows: list[dict[str, Any]], group: TrainingGroup
) -> None:
    file = read_training_file(write(tmp_path, *rows))
    assert file.groups == [group]
    assert (file.num_lines, file.num_rows, file.rejected) == (len(rows), len(rows), [])


@pytest.mark.parametrize(("rows", "group"), SAME_IN_EVERY_LAYOUT, ids=LAYOUT_NAMES)
def test_every_layout_says_the_same_as_parquet(
    tmp_path: Path, rows: list[dict[str, Any]], group: TrainingGroup
) -> None:
    path = parquet(tmp_path, rows)
    file = read_training_file(path)
    assert file.groups == [group]
    assert file.num_lines == file.num_rows == len(rows)
    assert file.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("row", [OURS, PAIR, SWIFT, FLAG], ids=LAYOUT_NAMES[:4])
def test_rows_without_instruction_get_that_of_the_file(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path, row)
    (group,) = read_training_file(path, instruction="Find law").groups
    assert group.instruction == "Find law"
    (group,) = read_training_file(path).groups
    assert group.instruction is None


def test_own_instruction_wins_and_an_empty_one_is_literal(tmp_path: Path) -> None:
    rows = [{**OURS, "instruction": value} for value in ("Own", "", None)]
    groups = read_training_file(write(tmp_path, *rows), instruction="File").groups
    assert [group.instruction for group in groups] == ["Own", "", "File"]


def test_pairs_are_grouped_by_query_and_instruction_in_order_of_appearance(tmp_path: Path) -> None:
    rows = [
        {"query": "b", "document": "1", "label": 1},
        {"query": "a", "document": "2", "label": 0},
        {"query": "b", "document": "3", "label": 0},
        {"query": "b", "document": "1", "label": 0, "instruction": "Other"},
        {"query": "b", "document": "4", "label": 1, "instruction": "File"},
        {"query": "a", "document": "5", "label": 0},
    ]
    file = read_training_file(write(tmp_path, *rows), instruction="File")
    assert file.groups == [
        TrainingGroup("b", ["1", "4"], ["3"], "File"),
        TrainingGroup("a", [], ["2", "5"], "File"),
        TrainingGroup("b", [], ["1"], "Other"),
    ]
    assert file.num_rows == file.num_lines == 6


@pytest.mark.parametrize(
    ("label", "relevant_from", "is_relevant"),
    [
        ("yes", 1, True),
        ("no", 1, False),
        (True, 3, True),
        (False, 1, False),
        (0, 1, False),
        (1, 1, True),
        (1, 2, False),
        (2, 2, True),
        (7, 2, True),
        ("yes", 5, True),
    ],
)
def test_labels(tmp_path: Path, label: object, relevant_from: int, is_relevant: bool) -> None:
    path = write(tmp_path, {**PAIR, "label": label})
    (group,) = read_training_file(path, relevant_from=relevant_from).groups
    assert (group.positive, group.negative) == ((["d"], []) if is_relevant else ([], ["d"]))


def test_relevant_from_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="relevant_from must be at least 1 and at most 2147483647, got 0"
    ):
        read_training_file(write(tmp_path, PAIR), relevant_from=0)


def test_flag_embedding_keys_that_say_nothing_are_ignored(tmp_path: Path) -> None:
    row = {**FLAG, "id": 3, "type": "normal", "pos_id": [1], "neg_id": ["a"], "pos_scores": None}
    assert read_training_file(write(tmp_path, row)).groups == [
        TrainingGroup("q", ["yes"], ["no", "never"], None)
    ]


def test_system_message_of_a_document_may_repeat_the_rows(tmp_path: Path) -> None:
    positive = [[system("Find law"), *answer("yes", "user")]]
    row = {
        **SWIFT,
        "messages": [system("Find law"), *SWIFT["messages"]],
        "positive_messages": positive,
    }
    assert read_training_file(write(tmp_path, row)).groups == [UNSCORED]
    row = {**SWIFT, "positive_messages": positive}
    path = write(tmp_path, row)
    assert read_training_file(path, instruction="Find law").groups == [UNSCORED]


def test_a_query_may_have_rows_that_share_documents(tmp_path: Path) -> None:
    rows = [OURS, {**OURS, "positive": ["sure"]}, {**OURS, "instruction": "x", "positive": ["no"]}]
    rows[2]["negative"] = ["yes"]
    assert len(read_training_file(write(tmp_path, *rows)).groups) == 3


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.xz", lzma.compress)],
)
def test_files_are_read_by_ending_and_hashed_as_they_are(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    content = compress(b"\xef\xbb\xbf" + json.dumps(OURS).encode() + b"\r\n\r\n \n")
    file = tmp_path / name
    file.write_bytes(content)
    assert read_training_file(str(file)) == TrainingFile(
        path=str(file),
        sha256=hashlib.sha256(content).hexdigest(),
        num_lines=1,
        groups=[TrainingGroup("q", ["yes"], ["no", "never"], None)],
        rejected=[],
        num_rows=1,
    )

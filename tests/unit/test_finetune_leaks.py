"""Leaks between training and evaluation, descriptions, and `validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qwen3_reranker
from finetune.cli import main
from finetune.data import (
    TrainingGroup,
    check_leaks,
    describe,
)
from qwen3_reranker.data.candidates import CandidateList
from tests.training_files import OURS, write


def candidates(query_id: str, query: str, texts: list[str], labels: list[int] | None) -> Any:
    return CandidateList(
        query_id, query, None, list(map(str, range(len(texts)))), texts, labels, []
    )


TRAIN = [
    TrainingGroup("What is  law?", ["Law is X", "shared"], ["bad"], None),
    TrainingGroup("other", ["Text"], ["worse"], None),
]


def test_clean_evaluation_has_no_leaks() -> None:
    lists = [
        candidates(
            "1", "new", ["bad", "text", "Law is X"], [1, 1, 0]
        ),  # irrelevant ones may repeat
        candidates("2", "newer", ["Law is X"], None),
    ]
    assert check_leaks(TRAIN, {"dev": lists, "guard": []}) == []


def test_leaking_queries_are_found_apart_from_case_spacing_and_forms() -> None:
    lists = [
        candidates("a", "what IS law?", ["n"], [1]),
        candidates("b", "\uff37hat is\u00a0law?\n", ["n"], None),
        candidates("c", "what is lore?", ["n"], [1]),
    ]
    assert check_leaks(TRAIN, {"dev": lists}) == [
        "dev: 2 of 3 queries stand in training (query_id a, b)"
    ]


def test_leaking_documents_are_found_per_set_and_kind() -> None:
    lists = [
        candidates("a", "what is law?", ["law  is x", "shared", "Text", "bad"], [1, 2, 1, 1]),
        candidates("b", "new", ["shared", "law is x"], [3, 3]),
    ]
    assert check_leaks(TRAIN, {"dev": lists[:1], "guard": lists[1:]}) == [
        "dev: 1 of 1 queries stand in training (query_id a)",
        "dev: 2 relevant documents are training positives of the same query (query_id a)",
        "dev: 1 relevant documents are training positives of other queries (query_id a)",
        "guard: 1 relevant documents are training positives of other queries (query_id b)",
    ]


def test_leaks_name_three_queries_and_no_texts() -> None:
    train = [TrainingGroup(f"CANARY {i}", ["CANARY"], ["no"], None) for i in range(9)]
    lists = [candidates(f"id{i}", f"CANARY {i}", ["CANARY"], [1]) for i in range(9)]
    queries, documents = check_leaks(train, {"dev": lists})
    assert queries == "dev: 9 of 9 queries stand in training (query_id id0, id1, id2)"
    assert documents.startswith("dev: 9 relevant documents are")
    assert "CANARY" not in documents


def test_describe_counts() -> None:
    groups = [
        TrainingGroup("a", ["1"], ["2", "3"], "x"),
        TrainingGroup("A ", ["1", "4"], ["2", "3", "5", "6"], "x"),
        TrainingGroup("b", ["1", "2", "3"], ["4"], "y"),
        TrainingGroup("c", ["1"], ["2"], None),
    ]
    assert describe(groups) == [
        "3 queries in 4 groups, 1 of them in more than one",
        "7 positives; per group 1 min, 1.5 median, 3 max",
        "8 negatives; per group 1 min, 1.5 median, 4 max",
        "2 own instructions, in 3 groups",
    ]


def test_describe_names_groups_of_one_kind() -> None:
    groups = [
        TrainingGroup("a", ["1"], [], None),
        TrainingGroup("b", [], ["2"], None),
        TrainingGroup("c", [], ["2"], None),
    ]
    assert describe(groups)[4:] == ["2 groups without a positive", "1 groups without a negative"]


def test_describe_takes_no_groups() -> None:
    assert describe([]) == ["0 queries"]


# The command.


def test_validate_describes_what_it_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, OURS, {**OURS, "query": "r", "instruction": "Find law"})
    assert main(["validate", path]) == 0
    out, err = capsys.readouterr()
    assert "2 rows" in out
    assert "2 queries in 2 groups" in out
    assert not err


def test_validate_goes_on_after_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path, {**OURS, "query": ""}, OURS, {"query": "q"}, name="bad.jsonl")
    empty = write(tmp_path, name="empty.jsonl")
    good = write(tmp_path, OURS)
    assert main(["validate", bad, empty, str(tmp_path / "missing.jsonl"), good]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(good)
    assert f"{bad}:1: 'query' must be" in err
    assert f"{bad}:3: 'positive' must be" in err
    assert f"0 rows in {empty}" in err
    assert "missing.jsonl cannot be read" in err


@pytest.mark.parametrize("arguments", [[], ["validate"], ["unknown"]])
def test_usage_errors_exit_with_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: qwen3-finetune" in capsys.readouterr().err


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"qwen3-finetune {qwen3_reranker.__version__}\n"

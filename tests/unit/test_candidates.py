from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen3_reranker import DataError
from qwen3_reranker.data.candidates import CandidateList, ndcg_at_10, read_candidate_rows


def write(tmp_path: Path, *rows: dict[str, Any]) -> str:
    file = tmp_path / "candidates.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def with_candidates(*candidates: Any, **others: Any) -> dict[str, Any]:
    return {"query": "q", "candidates": list(candidates), **others}


def test_read_rows_takes_every_key(tmp_path: Path) -> None:
    row = {
        "query_id": 7,
        "query": "apples",
        "instruction": "Find fruit",
        "candidates": [{"text": "red", "id": "d1", "label": 2}, {"text": "", "id": 2, "label": 0}],
        "missing_labels": [1, 3],
    }
    assert read_candidate_rows(write(tmp_path, row)) == [
        CandidateList("7", "apples", "Find fruit", ["d1", "2"], ["red", ""], [2, 0], [1, 3])
    ]


def test_read_rows_names_queries_by_line_and_documents_by_position(tmp_path: Path) -> None:
    bare = with_candidates({"text": "a"}, {"text": "b"})
    first, second = read_candidate_rows(write(tmp_path, bare, bare))
    assert first == CandidateList("1", "q", None, ["0", "1"], ["a", "b"], None, [])
    assert second.query_id == "2"


def test_read_rows_accepts_a_query_without_candidates(tmp_path: Path) -> None:
    (candidates,) = read_candidate_rows(write(tmp_path, with_candidates(missing_labels=[1])))
    assert (candidates.texts, candidates.labels) == ([], None)


def test_read_rows_null_labels_are_no_labels(tmp_path: Path) -> None:
    row = with_candidates({"text": "a", "label": None}, {"text": "b"})
    assert read_candidate_rows(write(tmp_path, row))[0].labels is None


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"candidates": []}, "'query' must be a string"),
        ({"query": 3, "candidates": []}, "'query' must be a string"),
        ({"query": " \n", "candidates": []}, "not blank"),
        (with_candidates(instruction=3), "'instruction' must be a string, got int"),
        ({"query": "q"}, "'candidates' must be a list"),
        ({"query": "q", "candidates": {"text": "a"}}, "'candidates' must be a list"),
        (with_candidates("text"), "candidates[0] must be an object with a string 'text'"),
        (with_candidates({"text": "a"}, {"id": "d"}), "candidates[1] must be an object"),
        (with_candidates({"text": None}), "candidates[0] must be an object"),
        (with_candidates({"text": "a", "label": 1}, {"text": "b"}), "candidates[1] must have"),
        (with_candidates({"text": "a"}, {"text": "b", "label": 0}), "candidates[1] must have"),
        (with_candidates({"text": "a", "label": 1.0}), "candidates[0] must have a whole 'label'"),
        (with_candidates({"text": "a", "label": -1}), "from 0 to 2147483647"),
        (with_candidates({"text": "a", "label": True}), "candidates[0] must have a whole 'label'"),
        (with_candidates({"text": "a", "label": "1"}), "candidates[0] must have a whole 'label'"),
        ({"query": "q", "positive": ["a"]}, "; this is a training row, for --train_file"),
        (with_candidates(missing_labels=1), "'missing_labels' must be a list"),
        (with_candidates(missing_labels=[1, -1]), "'missing_labels' must be a list"),
        (with_candidates(missing_labels=[True]), "'missing_labels' must be a list"),
    ],
)
def test_read_rows_names_line_and_fault(tmp_path: Path, row: dict[str, Any], fragment: str) -> None:
    path = write(tmp_path, with_candidates({"text": "fine"}), row)
    with pytest.raises(DataError, match=re.escape("line 2: ") + ".*" + re.escape(fragment)):
        read_candidate_rows(path)


def test_read_rows_reports_all_faults_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {}, with_candidates(), {"query": "q"})
    with pytest.raises(DataError, match=r"2 faults.*\n  line 1: 'query'.*\n  line 3: 'candidates'"):
        read_candidate_rows(path)


def test_read_rows_faults_never_quote_texts(tmp_path: Path) -> None:
    row = {"query": "CANARY", "candidates": [{"text": "CANARY", "label": "CANARY"}]}
    with pytest.raises(DataError, match="1 fault") as caught:
        read_candidate_rows(write(tmp_path, row))
    assert "CANARY" not in str(caught.value)


# 1/log2(rank + 1) for ranks 1, 2, 3, 4: 1, 0.6309298, 0.5, 0.4306766.
@pytest.mark.parametrize(
    ("labels", "scores", "missing", "expected"),
    [
        ([1], [0.3], [], 1.0),
        ([0, 1], [0.9, 0.1], [], 0.6309298),
        ([0, 0, 1], [0.1, 0.2, 0.9], [], 1.0),
        # (3 + 2 * 0.6309298 + 0 + 0.4306766) / (3 + 2 * 0.6309298 + 0.5)
        ([3, 2, 0, 1], [4.0, 3.0, 2.0, 1.0], [], 0.9854423),
        # (2 + 3 * 0.6309298) / (3 + 2 * 0.6309298): the gain is linear, not 2**label - 1
        ([2, 3], [1.0, 0.0], [], 0.9134016),
        # 1 / (1 + 0.6309298): one relevant document was never found
        ([1], [0.5], [1], 0.6131472),
        # 1 / (2 + 0.6309298)
        ([1], [0.5], [2], 0.3800938),
        ([], [], [1], 0.0),
        ([0, 0], [0.5, 0.1], [], 0.0),
        ([], [], [], 0.0),
    ],
)
def test_ndcg_at_10_equals_hand_computed_values(
    labels: list[int], scores: list[float], missing: list[int], expected: float
) -> None:
    assert ndcg_at_10(labels, scores, missing) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("labels", [[1, 0], [0, 1]])
def test_ndcg_at_10_orders_ties_worst_label_first(labels: list[int]) -> None:
    assert ndcg_at_10(labels, [0.5, 0.5]) == pytest.approx(0.6309298)


def test_ndcg_at_10_ignores_ranks_past_ten() -> None:
    scores = [-float(i) for i in range(11)]
    assert ndcg_at_10([0] * 10 + [1], scores) == 0.0
    assert ndcg_at_10([0] * 9 + [1] + [0], scores) == pytest.approx(0.2890648)  # 1 / log2(11)


def test_ndcg_at_10_ideal_holds_ten_documents() -> None:
    scores = [-float(i) for i in range(12)]
    assert ndcg_at_10([1] * 12, scores, [1, 1]) == 1.0


@pytest.mark.parametrize("label", [2**31, 10**400, -(10**400)])
def test_label_that_no_measure_can_count_is_a_fault(tmp_path: Path, label: int) -> None:
    rows = (
        with_candidates({"text": "a", "label": label}),
        with_candidates({"text": "a", "label": 1}, missing_labels=[label]),
    )
    for row in rows:
        with pytest.raises(DataError, match=r"line 1: .* from 0 to 2147483647"):
            read_candidate_rows(write(tmp_path, row))


def test_largest_label_is_counted(tmp_path: Path) -> None:
    row = with_candidates({"text": "a", "label": 2**31 - 1}, {"text": "b", "label": 0})
    (found,) = read_candidate_rows(write(tmp_path, row))
    assert ndcg_at_10(found.labels or [], [1.0, 0.0]) == 1.0


@pytest.mark.parametrize("id", [["x"], {}, True])
def test_ids_that_are_no_names_are_faults(tmp_path: Path, id: Any) -> None:
    for row in (with_candidates(query_id=id), with_candidates({"text": "a", "id": id})):
        with pytest.raises(DataError, match="id' must be a string or a number, got"):
            read_candidate_rows(write(tmp_path, row))

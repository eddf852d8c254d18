from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from qwen3_reranker import DocumentTooLargeError, InputError, NonFiniteScoreError, Reranker
from qwen3_reranker.bulk import BulkScorer
from qwen3_reranker.engine.packing import Pack
from tests import fakes

BATCH: dict[str, list[Any]] = {
    "id": [1, 2, 3, 4, 5],
    "query": ["red apple", "tea", "red apple", "tea", "red apple"],
    "document": ["green pear", "tea", "red apple", "rain", "red pear"],
    "instruction": [None, None, None, None, "Find fruit"],
}


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("as_columns", [list, lambda rows: np.array(rows, object)])
def test_batch_comes_back_with_the_scores_of_rank(as_columns: Any) -> None:
    batch = {name: as_columns(rows) for name, rows in BATCH.items()}
    found = BulkScorer("m")(batch)
    assert list(found) == [*BATCH, "score", "log_odds", "truncated"]
    assert all(found[name] is batch[name] for name in BATCH)
    for row in range(5):
        query, document, instruction = (
            BATCH[name][row] for name in ("query", "document", "instruction")
        )
        (result,) = Reranker("m").rank(query, [document], instruction=instruction)
        assert (found["score"][row], found["log_odds"][row], found["truncated"][row]) == (
            result.score, result.log_odds, result.truncated
        )  # fmt: skip
    assert found["score"].dtype == found["log_odds"].dtype == float


def test_equal_queries_share_their_head(model: fakes.FakeModel) -> None:
    BulkScorer("m")(BATCH)
    assert len(model.network.heads) == 3  # two queries, one of them under two instructions


@pytest.mark.usefixtures("model")
def test_settings_are_the_rerankers() -> None:
    batch = {"query": ["q"], "document": ["word " * 200]}
    assert BulkScorer("m", max_length=100)(batch)["truncated"].tolist() == [True]
    with pytest.raises(InputError, match="max_length must be"):
        BulkScorer("m", max_length=0)


@pytest.mark.usefixtures("model")
def test_batch_without_rows_stays_so() -> None:
    found = BulkScorer("m")({"query": [], "document": []})
    assert [len(column) for column in found.values()] == [0] * 5


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document": None}, "document is missing of id, query, instruction"),
        ({"score": [0.0] * 5}, "column score already, which would be overwritten"),
        ({"log_odds": [0.0] * 5}, "column log_odds already"),
        ({"query": ["q", "q", " ", "q", "q"]}, r"query of pairs\[2\] is blank"),
        ({"document": ["d", None, "d", "d", "d"]}, r"document of pairs\[1\] must be a string"),
        ({"query": ["q", "r", "q", "word " * 9000, "r"]}, r"^query of pairs\[3\]: query and inst"),
        ({"instruction": [None, 3.0, None, None, None]}, r"instruction\[1\] must be a string"),
    ],
)
def test_what_cannot_be_scored_is_told(change: dict[str, Any], message: str) -> None:
    batch = {name: rows for name, rows in {**BATCH, **change}.items() if rows is not None}
    with pytest.raises(InputError, match=message):
        BulkScorer("m")(batch)


@pytest.mark.parametrize("queries", [["q"] * 4, ["q", "r", "q", "r"]])
@pytest.mark.parametrize("error", [DocumentTooLargeError, NonFiniteScoreError])
def test_document_that_cannot_be_scored_is_named_by_its_row(
    monkeypatch: pytest.MonkeyPatch, queries: list[str], error: type[Exception]
) -> None:
    documents = ["short", "short", "short", "long " * 99]

    class Network(fakes.FakeNetwork):
        def score(self, pack: Pack) -> NDArray[np.float32]:
            long = [d.stop - d.start > 50 for span in pack.spans for d in span.documents]
            if any(long) and error is DocumentTooLargeError:
                raise MemoryError
            return np.where(long, np.float32(np.nan), np.float32(0))

    with (
        fakes.loaded(monkeypatch, fakes.FakeModel(network=Network())),
        pytest.raises(error, match=r"document of pairs\[3\]"),
    ):
        BulkScorer("m")({"query": queries, "document": documents})


def test_model_that_does_not_load_fails_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.replace_load_model(monkeypatch, lambda **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        BulkScorer("m")


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("name", ["query", "document", "instruction"])
@pytest.mark.parametrize(
    "column",
    ["abcde", b"abcde", {"a": 1}, {"a", "b"}, None, 7, np.array([["a"] * 5] * 5), np.ones(5),
     pd.DataFrame({"x": ["a"] * 5, "y": ["b"] * 5}), np.zeros(5), bytearray(5)],
)  # fmt: skip
def test_column_that_is_no_list_of_texts_is_refused_by_name(name: str, column: Any) -> None:
    with pytest.raises(InputError, match=f"column {name} must be a list of strings, got "):
        BulkScorer("m")({**BATCH, name: column})


@pytest.mark.usefixtures("model")
def test_column_that_can_be_read_once_is_refused() -> None:
    with pytest.raises(InputError, match="column query must be a list of strings, got generator"):
        BulkScorer("m")({"query": (q for q in "ab"), "document": ["a", "b"]})  # type: ignore[dict-item]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("name", ["query", "document", "instruction"])
def test_columns_of_other_lengths_are_refused(name: str) -> None:
    message = f"the columns of a batch must have one length, got .*4 of {name}.* A row is .*; pass"
    with pytest.raises(InputError, match=message):
        BulkScorer("m")({**BATCH, name: BATCH[name][:4]})


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    "batch",
    [[], "ab", None, 7, {10**5000: ["a"]}],
    ids=lambda value: type(value).__name__,
)
def test_batch_that_is_no_mapping_of_columns_is_refused(batch: Any) -> None:
    with pytest.raises(InputError, match=r"a batch (must map|needs the columns)"):
        BulkScorer("m")(batch)


@pytest.mark.usefixtures("model")
def test_series_and_tables_of_columns_are_scored() -> None:
    table = pd.DataFrame({"query": ["tea"] * 2, "document": ["green tea", "rain"]})
    found = BulkScorer("m")(table)
    assert found["score"].tolist() == Reranker("m").score("tea", ["green tea", "rain"])

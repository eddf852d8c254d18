from __future__ import annotations

import gzip
import lzma
import re
from pathlib import Path

import pytest

from qwen3_reranker import DataError
from qwen3_reranker.data.candidates import CandidateList
from qwen3_reranker.data.trec import files_of, read_candidates, read_run

CORPUS = """\
{"_id": "d1", "title": "Bread", "text": "rises by yeast.", "metadata": {}}
{"_id": "d2", "title": "", "text": "Tea is a drink."}

{"_id": "d3", "text": "Rust is a language."}
"""
QUERIES = """\
{"_id": "q1", "text": "why does bread rise?", "metadata": {}}
{"_id": "q2", "text": "what is tea?", "instruction": "Find drinks"}
{"_id": "q3", "text": "what is rust?"}
"""
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td9\t1\nq1\td3\t0\nq3\td3\t1\n"
RUN = """\
q1 Q0 d2 1 9.5 bm25
q2 Q0 d2 1 3.0 bm25
q1 Q0 d1 2 1e1 bm25
"""
FILES = {
    "corpus.jsonl": CORPUS,
    "queries.jsonl": QUERIES,
    "qrels/test.tsv": QRELS,
    "bm25.trec": RUN,
}
FIRST = CandidateList(
    "q1",
    "why does bread rise?",
    None,
    ["d1", "d2"],
    ["Bread rises by yeast.", "Tea is a drink."],
    [2, 0],
    [1],
)
NEVER_FOUND = CandidateList("q3", "what is rust?", None, [], [], [], [1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "food"
    write(folder, FILES)
    return folder


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")


def test_beir_folder_with_a_run_becomes_lists(folder: Path) -> None:
    assert read_candidates(str(folder)) == [FIRST, NEVER_FOUND]
    assert read_candidates(str(folder / "bm25.trec")) == [FIRST, NEVER_FOUND]


def test_trec_files_become_the_same_lists(folder: Path) -> None:
    (folder / "qrels/test.tsv").unlink()
    (folder / "corpus.jsonl").unlink()
    (folder / "queries.jsonl").unlink()
    write(
        folder,
        {
            "qrels.txt": "q1 0 d1 2\nq1 0 d9 1\nq1 0 d3 -1\nq3 0 d3 1\n",
            "corpus.tsv": "d1\tBread rises by yeast.\nd2\tTea is a drink.\nd3\tRust\tor iron.\n",
            "queries.tsv": "q1\twhy does bread rise?\nq2\twhat is tea?\nq3\twhat is rust?\n",
        },
    )
    assert read_candidates(str(folder)) == [FIRST, NEVER_FOUND]


def test_files_may_lie_anywhere(folder: Path) -> None:
    lists = read_run(
        str(folder / "bm25.trec"),
        corpus=str(folder / "corpus.jsonl"),
        queries=str(folder / "queries.jsonl"),
        qrels=str(folder / "qrels/test.tsv"),
    )
    assert lists == [FIRST, NEVER_FOUND]


def test_compressed_files_are_read(folder: Path) -> None:
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.write(CORPUS)
    with lzma.open(folder / "bm25.run.xz", "wt") as file:
        file.write(RUN)
    (folder / "corpus.jsonl").unlink()
    (folder / "bm25.trec").unlink()
    assert read_candidates(str(folder)) == [FIRST, NEVER_FOUND]


def test_without_qrels_lists_have_no_labels_and_instructions_are_kept(folder: Path) -> None:
    (folder / "qrels/test.tsv").unlink()
    first, second = read_candidates(str(folder))
    assert (first.labels, first.missing_labels) == (None, [])
    assert second == CandidateList(
        "q2", "what is tea?", "Find drinks", ["d2"], ["Tea is a drink."], None, []
    )


def test_equal_scores_keep_the_order_of_the_file_and_ranks_are_not_read(folder: Path) -> None:
    write(
        folder,
        {"bm25.trec": "q1 Q0 d3 7 2.0 x\nq1 Q0 d1 1 2.0 x\nq1 Q0 d2 0 -1 x\n"},
    )
    first, _ = read_candidates(str(folder))
    assert (first.ids, first.labels) == (["d3", "d1", "d2"], [0, 2, 0])


def test_split_that_judges_the_runs_queries_counts(folder: Path) -> None:
    header = "query-id\tcorpus-id\tscore\n"
    write(folder, {"qrels/train.tsv": f"{header}q9\td1\t1\n"})
    assert read_candidates(str(folder)) == [FIRST, NEVER_FOUND]
    write(folder, {"qrels/train.tsv": f"{header}q2\td1\t1\n"})
    assert read_candidates(str(folder)) == [FIRST, NEVER_FOUND]  # test.tsv, as in BEIR's reader
    (folder / "qrels/test.tsv").rename(folder / "qrels/dev.tsv")
    with pytest.raises(DataError, match=r"one file of 2 .* got dev.tsv, train.tsv\. Leave the one"):
        read_candidates(str(folder))


def test_files_of_a_collection_are_named_and_a_file_of_lists_is_itself(folder: Path) -> None:
    names = [Path(file).name for file in files_of(str(folder))]
    assert names == ["bm25.trec", "corpus.jsonl", "queries.jsonl", "test.tsv"]
    assert files_of("dev.jsonl") == ["dev.jsonl"]


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("bm25.trec", "q1 Q0 d3 1 2.0", "line 4: must have 6 columns"),
        ("bm25.trec", "q1 Q0 d3 1 nan x", "line 4: the score in column 5 must be a finite number"),
        ("bm25.trec", "q1 Q0 d3 1 high x", "line 4: the score in column 5 must be a finite number"),
        ("bm25.trec", "q1 Q0 d2 1 2.0 x", "line 4: its query and document are those of line 1"),
        ("bm25.trec", "q1 Q0 d7 1 2.0 x", "line 4: its document is not in "),
        ("bm25.trec", "q7 Q0 d1 1 2.0 x", "line 4: its query is not in "),
        ("qrels/test.tsv", "q1\td2", "line 6: must have 4 columns"),
        ("qrels/test.tsv", "q1\td2\t1.0", "line 6: the label in the last column must be a whole"),
        ("qrels/test.tsv", "q1\td2\trelevant", "line 6: the label in the last column"),
        ("qrels/test.tsv", "q1\td2\t2147483648", "line 6: the label in the last column must be a"),
        ("qrels/test.tsv", f"q1\td2\t1{'0' * 400}", "whole number of at most 2147483647"),
        ("qrels/test.tsv", f"q1\td2\t{'9' * 5000}", "whole number of at most 2147483647"),
        ("qrels/test.tsv", "q3\td3\t0", "line 6: its query and document are those of line 5"),
        ("qrels/test.tsv", "q8\td3\t1", "line 6: its query is not in "),
        ("corpus.jsonl", '{"_id": "d1", "text": "again"}', "line 5: its id is that of line 1"),
        ("corpus.jsonl", '{"_id": "d4"}', "line 5: must have a string 'text'"),
        ("corpus.jsonl", '{"_id": "d4", "text": "x"', "line 5: not JSON"),
        ("corpus.jsonl", '{"_id": "d4", "text": "x", "title": 3}', "'title' must be a string"),
        ("queries.jsonl", '{"_id": "q1", "text": "again"}', "line 4: its id is that of line 1"),
        ("queries.jsonl", '{"_id": "q4", "text": " "}', "line 4: 'text' is blank"),
        ("queries.jsonl", '{"_id": "q4", "text": "x", "instruction": 1}', "'instruction' must be"),
    ],
)
def test_fault_is_told_with_file_and_line(folder: Path, name: str, line: str, fault: str) -> None:
    with (folder / name).open("a") as file:
        file.write(f"{line}\n")
    expected = re.escape(f"{folder / name} has 1 fault; nothing was done:\n  ")
    with pytest.raises(DataError, match=f"{expected}.*{re.escape(fault)}"):
        read_candidates(str(folder))


def test_table_of_texts_has_a_tab_per_line(folder: Path) -> None:
    (folder / "queries.jsonl").unlink()
    write(folder, {"queries.tsv": "q1\twhy does bread rise?\nq2 what is tea?\nq3\tx\n"})
    with pytest.raises(DataError, match=r"queries.tsv has 1 fault.*\n  line 2: must be an id, a t"):
        read_candidates(str(folder))


def error_with_a_line_more(folder: Path, line: str) -> str:
    """Return the error after every file has got this line, too."""
    for name in FILES:
        with (folder / name).open("a") as file:
            file.write(f"{line}\n")
    with pytest.raises(DataError) as caught:
        read_candidates(str(folder))
    return str(caught.value)


def test_faults_of_all_files_come_at_once(folder: Path) -> None:
    assert error_with_a_line_more(folder, "nonsense").count("has 1 fault") == 4


def test_faults_never_quote_texts(folder: Path) -> None:
    line = '{"_id": 5, "text": "CANARY and more", "title": ["CANARY"]'
    assert "CANARY" not in error_with_a_line_more(folder, line)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("bm25.trec", r"has no run \(a file that ends in .trec or .run\). Pass the path of the"),
        ("corpus.jsonl", "must have one corpus.jsonl or corpus.tsv beside the run, got neither"),
        ("queries.jsonl", "must have one queries.jsonl or queries.tsv beside the run, got neither"),
    ],
)
def test_missing_file_is_told(folder: Path, removed: str, message: str) -> None:
    (folder / removed).unlink()
    with pytest.raises(DataError, match=message):
        read_candidates(str(folder))


def test_which_of_several_files_is_never_guessed(folder: Path) -> None:
    write(folder, {"dense.run": RUN})
    with pytest.raises(DataError, match=r"has 2 runs\. Pass the path of the run"):
        read_candidates(str(folder))
    assert read_candidates(str(folder / "dense.run")) == [FIRST, NEVER_FOUND]
    write(folder, {"corpus.tsv": "d1\tx\n"})
    with pytest.raises(DataError, match=r"got corpus\.jsonl and corpus\.tsv\. Put or link it"):
        read_candidates(str(folder / "dense.run"))


def test_empty_or_foreign_files_are_told(folder: Path) -> None:
    write(folder, {"qrels/test.tsv": "q9\td1\t1\n"})
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q9", "text": "other"}\n')
    with pytest.raises(DataError, match=r"test.tsv judges no query of .*bm25.trec. Pass the qrels"):
        read_candidates(str(folder))
    write(folder, {"bm25.trec": "\n"})
    with pytest.raises(DataError, match=r"bm25\.trec has no lines"):
        read_candidates(str(folder))
    with pytest.raises(DataError, match="cannot be read"):
        read_candidates(str(folder / "no.trec"))


def test_faults_never_quote_ids(folder: Path) -> None:
    """A column that was taken for ids may hold the texts."""
    with (folder / "bm25.trec").open("a") as file:
        file.write("q1 Q0 CANARY 1 2.0 x\nq1 Q0 CANARY 2 1.0 x\nCANARY Q0 d1 1 2.0 x\n")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "CANARY", "text": "a"}\n' * 2)
    with pytest.raises(DataError, match="its query and document are those of line 4") as caught:
        read_candidates(str(folder))
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("label", ["+2", "002", "0" * 5000 + "2"])
def test_labels_are_numbers_however_they_are_written(folder: Path, label: str) -> None:
    write(folder, {"qrels/test.tsv": f"q1\td1\t{label}\nq1\td2\t-{'9' * 5000}\n"})
    (first,) = read_candidates(str(folder))
    assert first.labels == [0, 2] or first.labels == [2, 0]

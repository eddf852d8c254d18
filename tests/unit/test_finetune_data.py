from __future__ import annotations

import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest

import qwen3_reranker
from finetune.cli import main
from finetune.data import TrainingGroup, read_groups
from qwen3_reranker import DataError

GOOD = {"query": "q", "positive": ["yes"], "negative": ["no", "never"]}


def write(tmp_path: Path, *rows: Any, name: str = "train.jsonl") -> str:
    file = tmp_path / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_read_groups_takes_every_key(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "instruction": "Find law"}, {**GOOD, "instruction": None}, GOOD)
    assert read_groups(path) == [
        TrainingGroup("q", ["yes"], ["no", "never"], "Find law"),
        TrainingGroup("q", ["yes"], ["no", "never"], None),
        TrainingGroup("q", ["yes"], ["no", "never"], None),
    ]


def test_read_groups_takes_empty_documents_and_instructions_literally(tmp_path: Path) -> None:
    row = {"query": "q", "positive": [" a "], "negative": [""], "instruction": ""}
    assert read_groups(write(tmp_path, row)) == [TrainingGroup("q", [" a "], [""], "")]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"query": None}, "'query' must be a string that is not blank"),
        ({"query": 3}, "'query' must be a string"),
        ({"query": " \t"}, "'query' must be a string that is not blank"),
        ({"positive": None}, "'positive' must be a list of at least one string"),
        ({"positive": []}, "'positive' must be a list of at least one string"),
        ({"positive": "text"}, "'positive' must be a list"),
        ({"negative": []}, "'negative' must be a list of at least one string"),
        ({"negative": {"text": "a"}}, "'negative' must be a list"),
        ({"positive": ["a", None]}, "positive[1] must be a string, got NoneType"),
        ({"positive": [["a", "b"]]}, "positive[0] must be a string, got list"),
        ({"negative": ["a", "b", 3]}, "negative[2] must be a string, got int"),
        ({"instruction": 3}, "'instruction' must be a string, got int"),
        ({"instruction": ["a"]}, "'instruction' must be a string, got list"),
        ({"positive": ["a", "b"], "negative": ["c", "b"]}, "a document is both"),
        ({"negatives": ["a"]}, "unknown key 'negatives'; rows have instruction, negative"),
        ({"pos": 1, "neg": 2}, "unknown key 'neg'"),
    ],
)
def test_read_groups_names_line_and_fault(
    tmp_path: Path, change: dict[str, Any], fragment: str
) -> None:
    path = write(tmp_path, GOOD, {**GOOD, **change})
    with pytest.raises(DataError, match=r"1 fault.*\n  line 2: " + re.escape(fragment)):
        read_groups(path)


@pytest.mark.parametrize("key", ["query", "positive", "negative"])
def test_read_groups_missing_key_is_named(tmp_path: Path, key: str) -> None:
    row = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(DataError, match=f"line 1: '{key}' must be"):
        read_groups(write(tmp_path, row))


def test_read_groups_reports_all_faults_at_once(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    lines = [
        json.dumps(GOOD),
        '{"query": "a", "query": "b"}',
        "",
        json.dumps({**GOOD, "positive": []}),
        json.dumps(GOOD)[:-5],
        r'{"query": "\ud800", "positive": ["a"], "negative": ["b"]}',
        "[]",
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_groups(str(file))
    head, *faults = str(caught.value).splitlines()
    assert head == f"{file} has 5 faults; nothing was done:"
    assert [fault.split(":")[0].strip() for fault in faults] == [
        "line 2", "line 4", "line 5", "line 6", "line 7"
    ]  # fmt: skip


def test_read_groups_faults_never_quote_texts(tmp_path: Path) -> None:
    rows = [
        {"query": "CANARY", "positive": ["CANARY"], "negative": ["CANARY"]},
        {"query": "CANARY", "positive": ["CANARY", 1], "negative": ["CANARY"]},
        {"query": "CANARY", "positive": "CANARY", "negative": ["CANARY"]},
    ]
    with pytest.raises(DataError, match="3 faults") as caught:
        read_groups(write(tmp_path, *rows))
    assert "CANARY" not in str(caught.value)


def test_validate_counts_what_it_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, GOOD, {**GOOD, "positive": ["a", "b"], "instruction": "Find law"})
    assert main(["validate", path]) == 0
    assert capsys.readouterr() == (
        f"{path}: 2 queries, 3 positives, 4 negatives, 1 with their own instruction\n",
        "",
    )


def test_validate_reads_compressed_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.jsonl.xz"
    file.write_bytes(lzma.compress(json.dumps(GOOD).encode()))
    assert main(["validate", str(file)]) == 0
    assert "1 queries" in capsys.readouterr().out


def test_validate_goes_on_after_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path, {**GOOD, "query": ""}, GOOD, {"query": "q"}, name="bad.jsonl")
    empty = write(tmp_path, name="empty.jsonl")
    good = write(tmp_path, GOOD)
    assert main(["validate", bad, empty, str(tmp_path / "missing.jsonl"), good]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: 1 queries, 1 positives, 2 negatives, 0 with")
    assert f"{bad} has 2 faults; nothing was done:\n  line 1: 'query'" in err
    assert "  line 3: 'positive' must be" in err
    assert f"{empty} has no rows" in err
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

from __future__ import annotations

import gzip
import io
import lzma
import random
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data import read_training_file
from qwen3_reranker import DataError
from qwen3_reranker.data.documents import read_documents
from qwen3_reranker.data.jsonl import Row, parse_rows, read_json, read_lines, read_rows
from qwen3_reranker.data.trec import _read_named, read_candidates, read_run


def write(tmp_path: Path, content: str | bytes, name: str = "rows.jsonl") -> str:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def only_fault(tmp_path: Path, line: str) -> str:
    (row,) = read_rows(write(tmp_path, line + "\n"))
    assert row.content is None
    return row.fault


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.xz", lzma.compress)],
)
def test_read_lines_decompresses_by_ending(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    path = write(tmp_path, compress("first\nzweite ü\n".encode()), name)
    assert list(read_lines(path)) == [(1, "first"), (2, "zweite ü")]


def test_read_lines_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, "北京\nb".encode())
    assert list(read_lines("-")) == [(1, "北京"), (2, "b")]


def test_read_rows_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b'{"a": 1}\n')
    assert list(read_rows("-")) == [Row(1, {"a": 1})]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\n \n\t\r\n", []),
        (b"a", [(1, "a")]),
        (b"\xef\xbb\xbfa\nb\n", [(1, "a"), (2, "b")]),
        (b"\xef\xbb\xbf\nb\n", [(2, "b")]),
        (b"a\r\nb\r\n", [(1, "a"), (2, "b")]),
        (b"a\n\n\nb\n", [(1, "a"), (4, "b")]),
        (b"  a \n", [(1, "  a ")]),
        ("a\u2028b\x0cc\n".encode(), [(1, "a\u2028b\x0cc")]),
        (b"a\n\xef\xbb\xbfb\n", [(1, "a"), (2, "\ufeffb")]),
    ],
    ids=[
        "empty",
        "blank",
        "no end",
        "bom",
        "bom alone",
        "crlf",
        "gaps",
        "spaces",
        "separators",
        "late bom",
    ],
)
def test_read_lines_numbers_lines_as_editors_do(
    tmp_path: Path, content: bytes, lines: list[tuple[int, str]]
) -> None:
    assert list(read_lines(write(tmp_path, content))) == lines


def test_read_lines_latin_1_byte_names_line_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path, b"fine\n\ncaf\xe9 here\n")
    with pytest.raises(DataError, match=r"rows\.jsonl line 3: byte 4 is not UTF-8"):
        list(read_lines(path))


@pytest.mark.parametrize(("name", "compress"), [("a.gz", gzip.compress), ("a.xz", lzma.compress)])
def test_read_lines_truncated_archive_names_file(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    noise = random.Random(0).randbytes(50_000).hex().encode()
    whole = compress(noise)
    path = write(tmp_path, whole[: len(whole) // 2], name)
    with pytest.raises(DataError, match=re.escape(f"{path} cannot be read: Compr")):
        list(read_lines(path))


@pytest.mark.parametrize("name", ["a.gz", "a.xz"])
def test_read_lines_file_that_is_no_archive_names_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, "plain text\n", name)
    with pytest.raises(DataError, match=re.escape(path)):
        list(read_lines(path))


def test_read_lines_missing_file_names_file_and_reason(tmp_path: Path) -> None:
    path = str(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=re.escape(path) + ".*No such file") as caught:
        list(read_lines(path))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_read_lines_folder_names_folder_and_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Is a directory"):
        list(read_lines(str(tmp_path)))


@pytest.mark.parametrize(
    ("line", "content"),
    [
        ('{"a": "é", "b": [1, 2.5, null]}', {"a": "é", "b": [1, 2.5, None]}),
        (r'{"a": "\ud83d\ude00"}', {"a": "😀"}),
        (r'{"a": "\u0000"}', {"a": "\0"}),
        ('{"a": {"b": 1}, "c": {"b": 2}}', {"a": {"b": 1}, "c": {"b": 2}}),
        ("{}", {}),
    ],
)
def test_read_rows_returns_objects_unchanged(
    tmp_path: Path, line: str, content: dict[str, Any]
) -> None:
    assert list(read_rows(write(tmp_path, line))) == [Row(1, content)]


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ('{"a": 1', "not JSON at column 8"),
        ("{'a': 1}", "not JSON at column 2"),
        ('{"a": 1} {"b": 2}', "not JSON at column 10: Extra data"),
        ('{"a": 1, "a": 2}', "a key is given twice"),
        ('{"a": [{"b": 1, "b": 1}]}', "a key is given twice"),
        (r'{"a": "\ud83d"}', "lone surrogate"),
        (r'{"a": ["x", "\ude00\ud83d"]}', "lone surrogate"),
        (r'{"\udfff": 1}', "lone surrogate"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": Infinity}', "Infinity is not a number"),
        ('{"a": [-Infinity]}', "-Infinity is not a number"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": -1e999}', "-1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ("[1]", "must be an object, got list"),
        ('"text"', "must be an object, got str"),
        ("3", "must be an object, got int"),
        ("null", "must be an object, got NoneType"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
    ids=lambda value: value[:20],
)
def test_read_rows_names_the_fault(tmp_path: Path, line: str, fragment: str) -> None:
    assert fragment in only_fault(tmp_path, line)


def test_read_rows_goes_on_after_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 1}\n{"a": \n\n{"a": 3}\n')
    assert [(row.line, row.content) for row in read_rows(path)] == [
        (1, {"a": 1}),
        (2, None),
        (4, {"a": 3}),
    ]


def test_read_rows_latin_1_byte_is_a_fault_of_its_row(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"a": 1}\n{"a": "caf\xe9"}\n\xff\n{"a": 4}\n')
    rows = list(read_rows(path))
    assert [row.line for row in rows if row.content] == [1, 4]
    assert [row.fault for row in rows if row.fault] == [
        "byte 11 is not UTF-8. Save the file as UTF-8.",
        "byte 1 is not UTF-8. Save the file as UTF-8.",
    ]


@pytest.mark.parametrize("seed", range(20))
def test_read_rows_accounts_for_every_line_that_is_not_blank(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    good, faulty, blank = ['{"a": 1}', "{}"], ["[]", "{", '{"a": NaN}', r'"\ud800"'], ["", " \t"]
    lines = chance.choices(good + faulty + blank, k=chance.randrange(60))
    rows = list(read_rows(write(tmp_path, "\n".join(lines))))
    accepted = [row.line for row in rows if row.content is not None]
    refused = [row.line for row in rows if row.fault]
    assert accepted == [i for i, line in enumerate(lines, 1) if line in good]
    assert refused == [i for i, line in enumerate(lines, 1) if line in faulty]
    assert len(accepted) + len(refused) == len(rows) == sum(bool(line.strip()) for line in lines)


def test_parse_rows_returns_what_parse_returns(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 5}\n\n{"a": 7}\n')
    assert parse_rows(path, lambda row, line: (row["a"], line)) == [(5, 1), (7, 3)]


def test_parse_rows_lists_every_fault_with_its_line(tmp_path: Path) -> None:
    def parse(row: dict[str, Any], line: int) -> None:
        if row["a"] < 0:
            raise ValueError(f"'a' is {row['a']}")

    path = write(tmp_path, '{"a": -4}\n{"a": 1}\n\n[]\n{"a": NaN}\n')
    with pytest.raises(DataError) as caught:
        parse_rows(path, parse)
    assert str(caught.value).splitlines() == [
        f"{path} has 3 faults; nothing was done:",
        "  line 1: 'a' is -4",
        "  line 4: must be an object, got list",
        "  line 5: NaN is not a number",
    ]


def test_parse_rows_one_fault_is_singular(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 1 fault; nothing was done:\n  line 1: must be"):
        parse_rows(write(tmp_path, "[]\n"), lambda row, line: row)


@pytest.mark.parametrize(("num_faults", "num_lines"), [(20, 21), (21, 22), (57, 22)])
def test_parse_rows_lists_twenty_faults_and_counts_the_others(
    tmp_path: Path, num_faults: int, num_lines: int
) -> None:
    with pytest.raises(DataError, match=f"has {num_faults} faults") as caught:
        parse_rows(write(tmp_path, "[]\n" * num_faults), lambda row, line: row)
    lines = str(caught.value).splitlines()
    assert len(lines) == num_lines
    if num_faults > 20:
        assert lines[-1] == f"  ... and {num_faults - 20} more"


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_parse_rows_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl has no rows"):
        parse_rows(write(tmp_path, content), lambda row, line: row)


def test_parse_rows_faults_never_quote_the_line(tmp_path: Path) -> None:
    lines = ['{"CANARY": "CANARY"', '{"CANARY": NaN}', '["CANARY"]', '{"CANARY": 1, "CANARY": 2}']
    with pytest.raises(DataError, match="4 faults") as caught:
        parse_rows(write(tmp_path, "\n".join(lines)), lambda row, line: row)
    assert "CANARY" not in str(caught.value)


def _faulty(tmp_path: Path, name: str, count: int) -> str:
    header = "id,text\n" if name.endswith(".csv") else ""
    return write(tmp_path, header + "x\n" * count, name)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("rows.jsonl", read_documents),
        ("rows.csv", read_documents),
        ("lists.jsonl", read_candidates),
        ("run.trec", lambda path: read_run(path, corpus="none", queries="none")),
        ("queries.tsv", lambda path: _read_named(path, lambda row, line: ("", None))),
        ("train.jsonl", read_training_file),
    ],
)
def test_of_endless_faults_the_first_twenty_are_kept(
    tmp_path: Path, name: str, read: Callable[[str], object]
) -> None:
    path = _faulty(tmp_path, name, 10_000)
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert f"{path} has 10000 faults" in message
    assert "... and 9980 more" in message
    assert peak < 600_000  # 10,000 messages alone take twice as much


@pytest.mark.parametrize("number", ["1" * 1_200_000 + ".5", "-1" + "0" * 500 + "e0"])
def test_number_that_is_too_large_is_told_by_its_length(tmp_path: Path, number: str) -> None:
    fault = only_fault(tmp_path, f'{{"a": {number}}}')
    assert fault == f"one of {len(number)} characters is too large for a number"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON at column 2"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "a key is given twice"),
        (b"NaN", "NaN is not a number"),
        (b'"\\ud83d"', "a string holds a lone surrogate"),
        (b"\xff", "byte 1 is not UTF-8"),
    ],
)
def test_file_of_one_value_is_read_strictly(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_json(write(tmp_path, content))


def test_file_of_one_value_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf["a"]')
    assert read_json(path) == ["a"]
    monkeypatch.setattr("qwen3_reranker.data.jsonl.MAX_LINE_BYTES", 7)
    with pytest.raises(ValueError, match="more than 7 bytes"):
        read_json(path)
    with pytest.raises(ValueError, match="FileNotFoundError"):
        read_json(str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["x" * 5000, "null\0character", "x" * 5000 + ".trec"])
def test_name_that_no_file_has_is_our_error(name: str) -> None:
    for read in (read_documents, read_candidates, read_training_file):
        with pytest.raises(DataError, match=r"cannot be read|beside the run, got neither"):
            read(name)

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from qwen3_reranker import DataError
from qwen3_reranker.data.documents import Document, read_documents, split_documents


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("", []),
        (" \n\t\n", []),
        ("tea", ["tea"]),
        ("tea\ncoffee", ["tea", "coffee"]),
        ("\n\ntea\r\ncoffee\n\n\n", ["tea", "coffee"]),
        ("tea\ncoffee\n  \n", ["tea", "coffee"]),
        ("tea\ncoffee\n\nmilk", ["tea\ncoffee", "milk"]),
        ("tea\n \t\n\r\nmilk\n", ["tea", "milk"]),
        ("  def f():\n    pass\n\n    x", ["  def f():\n    pass", "    x"]),
        ("a\u2028b\x0cc\nd", ["a\u2028b\x0cc", "d"]),  # no ends of lines in a text box
    ],
)
def test_text_is_split_into_lines_or_paragraphs(text: str, documents: list[str]) -> None:
    assert split_documents(text) == documents


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("d.txt", "\ufefftea\n\ncoffee", [("1", "tea"), ("3", "coffee")]),
        ("d.jsonl", '{"text": "tea"}\n{"text": "", "id": 7}', [("1", "tea"), ("7", "")]),
        ("d.csv", "\ufefftext\r\ntea\r\n\r\ncoffee\r\n", [("2", "tea"), ("4", "coffee")]),
        ("d.jsonl", '{"_id": "d1", "title": "Tea", "text": "x"}', [("d1", "x", "Tea")]),
        ("d.csv", "title,text\nTea,x", [("2", "x", "Tea")]),
        ("D.CSV", "id,text\n1,tea", [("1", "tea")]),
        ("D.JSONL", '{"text": "tea"}', [("1", "tea")]),
        ("d.csv", "text\n" + "x" * 200_000, [("2", "x" * 200_000)]),
        ("d.csv", 'id,text,x\na,"one, ""two""\n\nthree",\n', [("a", 'one, "two"\n\nthree')]),
    ],
)
def test_files_are_read_by_their_ending(
    tmp_path: Path, name: str, content: str, documents: list[tuple[str, ...]]
) -> None:
    expected = [Document(*each) for each in documents]
    file = tmp_path / name
    file.write_bytes(content.encode())
    assert read_documents(str(file)) == expected
    file = tmp_path / f"{name}.gz"
    file.write_bytes(gzip.compress(content.encode()))
    assert read_documents(str(file)) == expected


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("d.csv", b"", ["line 1 must name one column 'text', got 0 columns"]),
        ("d.csv", b"tea;milk\nx;y", ["got 1 columns of which 0", "commas"]),
        ("d.csv", b"text,text\nx,y", ["got 2 columns of which 2"]),
        ("d.csv", b"text\n", ["d.csv has no rows"]),
        (
            "d.csv",
            b"id,text\n1\n2,x\n3,x,y",
            ["2 faults", "line 2: 1 col", "line 4: 3"],
        ),
        ("d.csv", b'text\n"never closed', ["1 fault", "line 2: "]),
        ("d.csv", b"text\n\xff", ["line 2: byte 1 is not UTF-8"]),
        ("d.txt", b"%PDF-1.4\n\xe2\xe3", ["line 2: byte 1 is not UTF-8"]),
        ("d.jsonl", b'{"txt": "x"}', ["line 1: must have a string 'text'"]),
    ],
)
def test_faults_are_named_without_texts(
    tmp_path: Path, name: str, content: bytes, fragments: list[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_documents(str(file))
    assert all(fragment in str(caught.value) for fragment in fragments)
    assert "milk" not in str(caught.value)


def test_limit_of_cells_is_left_alone_while_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the process's: two threads that set it and put it back took it from each other."""
    file = tmp_path / "long.csv"
    file.write_text(f"text\n{'x' * 200_000}\n")
    calls: list[int] = []
    monkeypatch.setattr(csv, "field_size_limit", calls.append)
    assert [len(document.text) for document in read_documents(str(file))] == [200_000]
    assert not calls


@pytest.mark.parametrize("id", ["[1]", "{}", "true", '["CANARY"]'])
def test_id_that_is_no_name_is_refused(tmp_path: Path, id: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "a", "id": {id}}}\n')
    with pytest.raises(DataError, match="line 1: 'id' must be a string or a number") as caught:
        read_documents(str(file))
    assert "CANARY" not in str(caught.value)

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qwen3_reranker.checkpoint.gguf_header import find_fault

UINT32, FLOAT32, STRING, ARRAY, UINT64 = 4, 6, 8, 9, 10


def string(text: str, order: str = "<") -> bytes:
    return struct.pack(f"{order}Q", len(text)) + text.encode()


def field(key: str, kind: int, value: bytes, order: str = "<") -> bytes:
    return string(key, order) + struct.pack(f"{order}I", kind) + value


def header(*fields: bytes, order: str = "<", count: int | None = None) -> bytes:
    num_fields = len(fields) if count is None else count
    return b"GGUF" + struct.pack(f"{order}IQQ", 3, 0, num_fields) + b"".join(fields)


def array(kind: int, length: int, content: bytes = b"", order: str = "<") -> bytes:
    return struct.pack(f"{order}IQ", kind, length) + content


def fault(tmp_path: Path, content: bytes) -> str:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    return find_fault(file)


@pytest.mark.parametrize("order", ["<", ">"])
def test_metadata_that_are_what_they_say_have_no_fault(tmp_path: Path, order: str) -> None:
    fields = (
        field("general.name", STRING, string("x", order), order),
        field("qwen3.block_count", UINT32, struct.pack(f"{order}I", 36), order),
        field("llama.block_count", UINT64, struct.pack(f"{order}Q", 36), order),
        field("a", ARRAY, array(FLOAT32, 2, bytes(8), order), order),
        field("b", ARRAY, array(STRING, 2, string("x", order) + string("", order), order), order),
        field("c", ARRAY, array(STRING, 0, b"", order), order),
    )
    assert fault(tmp_path, header(*fields, order=order)) == ""


@pytest.mark.parametrize("content", [b"", b"GG", b"safetensors"])
def test_what_is_no_gguf_file_is_left_to_the_library(tmp_path: Path, content: bytes) -> None:
    assert fault(tmp_path, content) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(count=2**63), "it ends within its metadata"),
        (header()[:20], "it ends within its metadata"),
        (header(field("a", UINT32, b"xx")), "it ends within its metadata"),
        (header(field("a", STRING, struct.pack("<Q", 2**63))), "it ends within its metadata"),
        (header(field("a", ARRAY, array(FLOAT32, 1_000_000))), "it ends within its metadata"),
        (header(field("a", ARRAY, array(STRING, 1_000_000))), "it ends within its metadata"),
        (header(field("a", ARRAY, array(FLOAT32, 2**40))), "it claims more than 4000000 values"),
        (header(field("a", ARRAY, array(ARRAY, 1))), "a value is of a kind that there is not"),
        (header(field("a", 99, b"")), "a value is of a kind that there is not"),
        (header(field("x.block_count", UINT32, b"\xff" * 4)), "it claims more than 1000 layers"),
        (header(field("x.block_count", UINT64, b"\xff" * 8)), "it claims more than 1000 layers"),
    ],
)
def test_metadata_that_claim_more_than_there_is_are_a_fault(
    tmp_path: Path, content: bytes, message: str
) -> None:
    assert fault(tmp_path, content) == message


def test_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    assert find_fault(tmp_path / "none") == "it cannot be read (FileNotFoundError)"


def test_values_of_all_arrays_are_counted_together(tmp_path: Path) -> None:
    arrays = [field(str(i), ARRAY, array(0, 1_500_000, bytes(1_500_000))) for i in range(3)]
    assert fault(tmp_path, header(*arrays[:2])) == ""
    assert fault(tmp_path, header(*arrays)) == "it claims more than 4000000 values"

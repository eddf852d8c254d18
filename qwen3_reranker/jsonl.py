"""Strict reading of text and JSON lines, plain or compressed.

Decides what a well-formed line is. Knows nothing of what rows mean. Other readers guess: a repeated
key or a lone surrogate makes them drop or mistake values without a word.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar

from .errors import DataError

STDIN = "-"
MAX_LINE_BYTES = 64 * 1024 * 1024
"""Of a line, unpacked; no text of a reranker is as long."""
_MOST_LINES = 100_000
"""Of a file that is limited: a line takes some hundred bytes of memory, however short it is."""

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a JSONL file: its content, or why it has none.

    Attributes:
        line: Line number, from 1.
        content: The object, or None if the line is faulty.
        fault: What is wrong, empty if nothing is.
    """

    line: int
    content: dict[str, Any] | None
    fault: str = ""


def read_lines(
    path: str, *, keep_blank: bool = False, max_bytes: int | None = None
) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of each line, without its line ending.

    Args:
        path: A file, read as gzip or xz if it ends in .gz or .xz, or "-" for standard input.
        keep_blank: Yield blank lines too.
        max_bytes: Of the whole file, unpacked, which may then have 100,000 lines, too; None sets no
            limit.

    Raises:
        DataError: If the file cannot be opened, decompressed or decoded as UTF-8, or is too long.
    """
    for number, raw in _raw_lines(path, max_bytes):
        try:
            text = _decode(number, raw)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} line {number}: {_not_utf8(error)}") from error
        if keep_blank or text.strip():
            yield number, text


def read_rows(path: str, *, max_bytes: int | None = None) -> Iterator[Row]:
    """Yield each JSON line as an object or a fault; every line that is not blank is accounted for.

    Raises:
        DataError: If the file cannot be opened or decompressed.
    """
    for line, raw in _raw_lines(path, max_bytes):
        try:
            text = _decode(line, raw)
            if not text.strip():
                continue
            content = json.loads(
                text,
                object_pairs_hook=_unique,
                parse_constant=_refuse_constant,
                parse_float=_finite,
            )
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            yield Row(line, None, _not_utf8(error))
        except json.JSONDecodeError as error:
            yield Row(line, None, f"not JSON at column {error.colno}: {error.msg}")
        except UnicodeEncodeError:
            yield Row(line, None, "a string holds a lone surrogate, half of a character")
        except ValueError as error:
            yield Row(line, None, str(error))
        except RecursionError:
            yield Row(line, None, "nested too deeply")
        else:
            if isinstance(content, dict):
                yield Row(line, content)
            else:
                yield Row(line, None, f"must be an object, got {type(content).__name__}")


def parse_rows(
    path: str,
    parse: Callable[[dict[str, Any], int], Parsed],
    *,
    max_bytes: int | None = None,
) -> list[Parsed]:
    """Parse every row of a file, or report every fault of it.

    Args:
        path: As `read_lines`.
        parse: Called with the object and its line number; raises ValueError to refuse it.
        max_bytes: As `read_lines`.

    Raises:
        DataError: If the file has a fault or no rows; the first twenty faults are listed.
    """
    parsed, faults = [], []
    for row in read_rows(path, max_bytes=max_bytes):
        try:
            if row.content is None:
                raise ValueError(row.fault)
            parsed.append(parse(row.content, row.line))
        except ValueError as error:
            faults.append(f"line {row.line}: {error}")
    if faults:
        raise faults_error(path, faults)
    if not parsed:
        raise DataError(f"{path} has no rows. Pass a file with one JSON object per line.")
    return parsed


def faults_error(path: str, faults: Sequence[str]) -> DataError:
    """Return the error that counts the faults of a file and lists the first twenty."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    more = [f"... and {len(faults) - 20} more"] if len(faults) > 20 else []
    lines = [f"{path} has {count}; nothing was done:", *faults[:20], *more]
    return DataError("\n  ".join(lines))


def _raw_lines(path: str, max_bytes: int | None = None) -> Iterator[tuple[int, bytes]]:
    number = read = 0
    try:
        with _open(path) as file:
            # Never more than a line's limit at once: a few packed kilobytes hold gigabytes.
            for number, raw in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
                read += len(raw)
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path} line {number} has more than {MAX_LINE_BYTES} bytes, which no "
                        "document needs. Check the file, or cut the line."
                    )
                if max_bytes is not None and read > max_bytes:
                    raise DataError(
                        f"{path} has more than {max_bytes} bytes when unpacked, too many here. "
                        "Pass a smaller file."
                    )
                if max_bytes is not None and number > _MOST_LINES:
                    raise DataError(
                        f"{path} has more than {_MOST_LINES} lines, too many here. Pass a smaller "
                        "file."
                    )
                yield number, raw
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        where = f" after line {number}" if number else ""
        raise DataError(f"{path} cannot be read{where}: {reason}. Check the file.") from error


def _decode(number: int, raw: bytes) -> str:
    return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.start + 1} is not UTF-8. Save the file as UTF-8."


def _open(path: str) -> AbstractContextManager[BinaryIO]:
    if path == STDIN:
        if sys.stdin is None:
            raise OSError("there is no standard input")
        return nullcontext(sys.stdin.buffer)  # not ours to close
    if path.lower().endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    if path.lower().endswith(".xz"):
        return lzma.open(path)  # type: ignore[return-value]
    return open(path, "rb")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is given twice")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value

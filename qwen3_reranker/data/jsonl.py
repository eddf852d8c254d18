"""Strict reading of text and JSON lines, plain or compressed.

Decides what a well-formed line is. Knows nothing of what rows mean. Other readers guess: a repeated
key or a lone surrogate makes them drop or mistake values without a word.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar

from ..errors import DataError

STDIN = "-"
MAX_LINE_BYTES = 64 * 1024 * 1024
"""Of a line, unpacked; no text of a reranker is as long."""
_MOST_LINES = 100_000
"""Of a file that is limited: a line takes some hundred bytes of memory, however short it is."""
_MOST_FAULTS = 20
"""Told of a file: what is wrong with thousands of lines is wrong with the file."""

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


class Faults:
    """What is wrong with a file, line by line: the first twenty faults, and how many there are.

    Args:
        path: The file.
        found: Faults known already.
    """

    def __init__(self, path: str, found: Iterable[str] = ()) -> None:
        self._path = path
        self._first: list[str] = []
        self._count = 0
        for fault in found:
            self.add(fault)

    def __len__(self) -> int:
        return self._count

    def add(self, fault: str) -> None:
        """Count a fault, which begins with its line."""
        self._count += 1
        if self._count <= _MOST_FAULTS:
            self._first.append(fault)

    def error(self) -> DataError:
        """Return the error that lists the first faults and counts the others."""
        count = "1 fault" if self._count == 1 else f"{self._count} faults"
        others = self._count - len(self._first)
        more = [f"... and {others} more"] if others else []
        lines = [f"{self._path} has {count}; nothing was done:", *self._first, *more]
        return DataError("\n  ".join(lines))


def read_lines(
    path: str, *, keep_blank: bool = False, max_bytes: int | None = None
) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of each line, without its line ending.

    Args:
        path: A file, read as gzip or xz if it ends in .gz or .xz, or "-" for standard input.
        keep_blank: Yield blank lines too.
        max_bytes: Limit of the whole file, unpacked; with one, 100,000 lines are the limit, too.
            None sets neither.

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
            content = _parse(text)
        except UnicodeDecodeError as error:
            yield Row(line, None, _not_utf8(error))
        except ValueError as error:
            yield Row(line, None, str(error))
        else:
            if isinstance(content, dict):
                yield Row(line, content)
            else:
                yield Row(line, None, f"must be an object, got {type(content).__name__}")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return what is in a file of at most 64 MiB.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it has more.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_LINE_BYTES + 1)
    if len(raw) > MAX_LINE_BYTES:
        raise ValueError(f"more than {MAX_LINE_BYTES} bytes")
    return raw


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the content of a file that is one JSON value, of at most 64 MiB.

    Raises:
        ValueError: With what is wrong, in a few words; the caller says with which file.
    """
    try:
        return _parse(read_bytes(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from error
    except OSError as error:
        raise ValueError(type(error).__name__) from error


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
    parsed, faults = [], Faults(path)
    for row in read_rows(path, max_bytes=max_bytes):
        try:
            if row.content is None:
                raise ValueError(row.fault)
            parsed.append(parse(row.content, row.line))
        except ValueError as error:
            faults.add(f"line {row.line}: {error}")
    if faults:
        raise faults.error()
    if not parsed:
        raise DataError(f"{path} has no rows. Pass a file with one JSON object per line.")
    return parsed


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
    except DataError:
        raise
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        # ValueError: a path with a null character, a closed standard input.
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


def _parse(text: str) -> Any:
    """Return the value of a JSON text; raise ValueError, which quotes nothing, if it is none."""
    try:
        content = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at column {error.colno}: {error.msg}") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string holds a lone surrogate, half of a character") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return content


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
        what = text if len(text) <= 20 else f"one of {len(text)} characters"
        raise ValueError(f"{what} is too large for a number")
    return value

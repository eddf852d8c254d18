"""Documents from a file or a text box.

Decides where one document ends and the next begins. Knows nothing of scores.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .jsonl import MAX_LINE_BYTES, Faults, parse_rows, read_lines

# csv by itself refuses cells of more than 131,072 characters. The limit is the process's: set while
# a file is read, it would be another thread's, too, or be taken from under it.
csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file.

    Attributes:
        id: Its name, or its line number.
        text: What it says.
        title: Its title; empty where it has none.
    """

    id: str
    text: str
    title: str = ""

    @property
    def titled_text(self) -> str:
        """The text after its title, as BEIR and MTEB join them."""
        return f"{self.title} {self.text}".strip() if self.title else self.text


def split_documents(text: str) -> list[str]:
    r"""Return the documents of a text: its lines, or its paragraphs where blank lines part them.

    Example:
        >>> split_documents("tea\ncoffee\n")
        ['tea', 'coffee']
        >>> split_documents("def tea():\n    pour()\n\nmilk")
        ['def tea():\n    pour()', 'milk']
    """
    text = text.replace("\r\n", "\n")
    paragraphs = _not_blank(re.split(r"\n\s*\n", text))
    return paragraphs if len(paragraphs) > 1 else _not_blank(text.split("\n"))


def _not_blank(parts: list[str]) -> list[str]:
    return [part.strip("\n") for part in parts if part.strip()]


def read_documents(path: str, *, max_bytes: int | None = None) -> list[Document]:
    """Read documents from a file, plain or ending in .gz or .xz.

    A .jsonl file holds a `{"text", "id"?, "title"?}` per line, a .csv file a header with a column
    "text" and maybe "id" and "title", any other file a document per line. `_id`, BEIR's name for
    it, is an id too. With `max_bytes`, a file that has more, unpacked, or more than 100,000 lines
    is refused; None reads all.

    Raises:
        DataError: If the file cannot be read or has a fault.
    """
    name = path.lower().removesuffix(".gz").removesuffix(".xz")
    if name.endswith(".jsonl"):
        return parse_rows(path, parse_document, max_bytes=max_bytes)
    if name.endswith(".csv"):
        return _read_csv(path, max_bytes)
    return [Document(str(line), text) for line, text in read_lines(path, max_bytes=max_bytes)]


def parse_document(row: dict[str, Any], line: int) -> Document:
    """Return the document of a row.

    Raises:
        ValueError: If the row has no text, or a title that is none.
    """
    if not isinstance(row.get("text"), str):
        raise ValueError("must have a string 'text'")
    title = row.get("title")
    if title is not None and not isinstance(title, str):
        raise ValueError(f"'title' must be a string, got {type(title).__name__}")
    id = name_of(row, "id" if row.get("_id") is None else "_id", line)
    return Document(id, row["text"], title or "")


def name_of(row: dict[str, Any], key: str, position: int) -> str:
    """Return the name that a row gives under a key, or else its position.

    Raises:
        ValueError: If the name is neither a string nor a number.
    """
    name = row.get(key)
    if name is None:
        return str(position)
    if isinstance(name, bool) or not isinstance(name, (str, int, float)):
        raise ValueError(f"'{key}' must be a string or a number, got {type(name).__name__}")
    return str(name)


def _read_csv(path: str, max_bytes: int | None) -> list[Document]:
    # A blank line may stand inside a quoted text.
    lines = (f"{text}\n" for _, text in read_lines(path, keep_blank=True, max_bytes=max_bytes))
    reader = csv.reader(lines, strict=True)
    documents, faults = [], Faults(path)
    try:
        header = next(reader, [])
        if header.count("text") != 1:
            raise DataError(
                f"{path} line 1 must name one column 'text', got {len(header)} columns of which "
                f"{header.count('text')} are so named. Separate columns with commas."
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                faults.add(f"line {reader.line_num}: {len(row)} columns, not {len(header)}")
                continue
            named = {name: cell for name, cell in zip(header, row, strict=True)
                     if cell or name == "text"}  # fmt: skip
            documents.append(parse_document(named, reader.line_num))
    except csv.Error as error:
        faults.add(f"line {reader.line_num}: {error}")
    if faults:
        raise faults.error()
    if not documents:
        raise DataError(f"{path} has no rows. Pass a file with one document per row.")
    return documents

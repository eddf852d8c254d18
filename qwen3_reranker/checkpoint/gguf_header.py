"""The metadata of a GGUF file, walked before a library reads them.

Decides whether they are as long as they say. The gguf package believes the length of an array:
one kilobyte that claims 2**40 numbers fills the memory. Knows nothing of what the metadata mean,
but for the number of layers, of which a configuration makes lists.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by the number of its type; strings and arrays bring their length."""
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 4_000_000
"""In all arrays together; each costs some hundred bytes of memory. A vocabulary of 262,144 tokens
has three arrays of that length and one of merges."""
MOST_LAYERS = 1000
"""Of a decoder; the largest that are admitted have 36."""


def find_fault(file: Path) -> str:
    """Return what is wrong with the metadata, empty if nothing is or it is no GGUF file."""
    try:
        with file.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                return ""
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(data).find_fault()
    except struct.error:
        return "it ends within its metadata"
    except OSError as error:
        return f"it cannot be read ({type(error).__name__})"


class _Walk:
    """A place in the metadata, and how many values were passed."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(_MAGIC)
        self._order = "<"
        self._num_values = 0

    def find_fault(self) -> str:
        version = self._number("I")
        if version & 0xFFFF == 0:  # written by a machine of the other byte order
            self._order = ">"
        self._number("Q")  # tensors; each has a name in the file
        for _ in range(self._number("Q")):
            start = self._at + 8
            self._skip(self._number("Q"))
            key = self._data[start : self._at]
            kind = self._number("I")
            if key.endswith(b".block_count") and _SIZES.get(kind) in (4, 8):
                layers = self._number("I" if _SIZES[kind] == 4 else "Q")
                if layers > MOST_LAYERS:
                    return f"it claims more than {MOST_LAYERS} layers"
            elif fault := self._pass_value(kind):
                return fault
        return ""

    def _pass_value(self, kind: int) -> str:
        count = 1
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
        self._num_values += count
        if self._num_values > _MOST_VALUES:
            return f"it claims more than {_MOST_VALUES} values"
        if kind in _SIZES:
            self._skip(_SIZES[kind] * count)
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            return "a value is of a kind that there is not"
        return ""

    def _number(self, form: str) -> int:
        number: int
        (number,) = struct.unpack_from(self._order + form, self._data, self._at)
        self._at += struct.calcsize(form)
        return number

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise struct.error("past the end")

"""Texts as a tokenizer may have them: no half characters, and no more of them than is needed.

Decides where a text may be cut and what stands for what UTF-8 cannot carry. Knows nothing of
tokens.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .strings import repaired

_WINDOW_CHARS = 64_000


def beginning(text: str, num_chars: int) -> str:
    """Return what the first ids of a text are made of: its first `num_chars` characters or more.

    NFC sorts a run of combining marks as a whole, by their class, so a run cut in two would change
    even its first ids. Of a run that goes on past the end, as many marks of each class are kept as
    could be read: those behind them have none that they could move in front of.
    """
    if num_chars >= len(text) or not unicodedata.combining(text[num_chars]):
        return text[:num_chars]
    first = num_chars
    while first and unicodedata.combining(text[first - 1]):
        first -= 1
    kept: list[str] = []
    start = first
    counts: Counter[int] = Counter()
    while start < len(text):  # a window at a time: a run of millions takes milliseconds
        window = text[start : start + _WINDOW_CHARS]
        kinds = _combining_classes()[np.frombuffer(window.encode("utf-32-le"), np.uint32)]
        ends = np.flatnonzero(kinds == 0)
        kinds = kinds[: ends[0]] if len(ends) else kinds
        places = [np.empty(0, np.int64)]
        for kind in np.unique(kinds).tolist():
            places.append(np.flatnonzero(kinds == kind)[: num_chars - counts[kind]])
            counts[kind] += len(places[-1])
        kept += [window[place] for place in np.sort(np.concatenate(places)).tolist()]
        if len(ends):
            break
        start += len(window)
    return text[:first] + "".join(kept)


@cache
def _combining_classes() -> NDArray[np.uint8]:
    """Return the canonical combining class of each code point; 0 is no combining mark."""
    return np.array([unicodedata.combining(chr(i)) for i in range(sys.maxunicode + 1)], np.uint8)


def repair_surrogates(texts: Sequence[str]) -> tuple[list[str], int]:
    """Join surrogate pairs, replace lone surrogates by U+FFFD, and count the texts changed."""
    fixed, count = [], 0
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = repaired(text)
            count += 1
        fixed.append(text)
    return fixed, count

"""Text that fits a terminal of 80 columns."""

from __future__ import annotations

import unicodedata

WIDTH = 80


def fit(text: str, width: int = WIDTH) -> str:
    """Return the beginning of a text in at most `width` columns, without control characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if sum(map(_columns, text)) <= width:
        return text
    shown, used = "", 1  # the ellipsis
    for character in text:
        used += _columns(character)
        if used > width:
            break
        shown += character
    return shown + "…" if width > 0 else ""


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1

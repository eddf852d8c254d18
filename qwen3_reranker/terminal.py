"""Text that fits a terminal of 80 columns."""

from __future__ import annotations

import unicodedata

WIDTH = 80


def fit(text: str, width: int = WIDTH) -> str:
    """Return the beginning of a text in at most `width` columns, without control characters."""
    shown: list[str] = []
    used = 0
    for character in text:
        if not character.isprintable():
            character = " "
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + columns > width - 1:
            return "".join(shown) + "…"
        shown.append(character)
        used += columns
    return "".join(shown)

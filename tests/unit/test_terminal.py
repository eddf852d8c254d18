from __future__ import annotations

import pytest

from qwen3_reranker.cli.terminal import fit


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "ab…"),
        ("a\nb\tc", 5, "a b c"),
        ("日本語", 6, "日本語"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
        ("", 0, ""),
    ],
)
def test_fit_keeps_what_fits(text: str, width: int, shown: str) -> None:
    assert fit(text, width) == shown


def test_fit_is_eighty_columns_by_default() -> None:
    assert fit("x" * 80) == "x" * 80
    assert fit("x" * 81) == "x" * 79 + "…"

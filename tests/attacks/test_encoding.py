"""Texts made to be long: what is read of them, and that it changes no id."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_reranker import InputError
from qwen3_reranker.text.steps import finish
from tests.attacks.limits import bounded
from tests.real_parts import qwen3_tokenizer

pytestmark = pytest.mark.attack

_MEGABYTE = 1_000_000
LONG = {
    "digits": "1" * 8 * _MEGABYTE,
    "letters": "a" * 8 * _MEGABYTE,
    "spaces": " " * 8 * _MEGABYTE,
    "newlines": "\n" * 8 * _MEGABYTE,
    "one mark": "e" + "\u0301" * 4 * _MEGABYTE,
    "marks of two classes": "e" + "\u0301\u0323" * 2 * _MEGABYTE,
    "syllables in parts": "\u1100\u1161\u11a8" * _MEGABYTE,
    "emoji": "👩\u200d🔬" * _MEGABYTE,
    "base64": "".join(random.Random(0).choices("AZaz09+/", k=8 * _MEGABYTE)),
    "halves of characters": chr(0xD83D) * 2 * _MEGABYTE,
}
# Pieces whose ids depend on what stands around them: runs, marks that sort, parts that compose.
_PIECES = st.sampled_from(
    [" ", "\n", "1", "a", "é", "e\u0301", "\u0301", "\u0323", "\u0302", "\u05b0", "\u0f71",
     "\u0f72", "\u1100\u1161", "\u11a8", "中", "👩\u200d🔬", "\t", "'s", "-", "<|im_end|>",
     "\u0344", "\u3099"]
)  # fmt: skip


@pytest.mark.parametrize("kind", LONG)
def test_long_document_costs_what_fits(kind: str) -> None:
    tokenizer = qwen3_tokenizer()
    tokenizer.encode_group(None, "q", ["e" + "\u0301" * 100_000], max_length=512)  # tables are made
    with bounded(seconds=6, megabytes=250):
        group = tokenizer.encode_group(None, "q", [LONG[kind]], max_length=8192)
    assert group.truncated == [True]


@pytest.mark.parametrize("kind", LONG)
def test_long_query_and_instruction_are_refused_at_once(kind: str) -> None:
    tokenizer = qwen3_tokenizer()
    for instruction, query in ((None, LONG[kind]), (LONG[kind], "q")):
        with bounded(seconds=6, megabytes=250), pytest.raises(InputError, match="are never cut"):
            tokenizer.encode_group(instruction, query, ["d"], max_length=8192)


@pytest.mark.parametrize("kind", LONG)
def test_few_tokens_of_a_long_document_cost_little(kind: str) -> None:
    with bounded(seconds=2, megabytes=150):
        cut = finish(qwen3_tokenizer().cut_steps(LONG[kind], 5))
    assert len(cut) < 2_000


def test_ids_are_those_of_the_whole_text(tried: Callable[[int], None]) -> None:
    tokenizer, count = qwen3_tokenizer(), 0
    head = len(tokenizer.encode_group(None, "q", [], max_length=8192).head)
    least = head + len(tokenizer.suffix)

    @settings(
        max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        st.lists(st.tuples(_PIECES, st.integers(1, 3000) | st.integers(1, 5)), max_size=8),
        st.integers(1, 40),
    )
    def check(runs: list[tuple[str, int]], room: int) -> None:
        nonlocal count
        count += 1
        text = "".join(piece * times for piece, times in runs)
        group = tokenizer.encode_group(None, "q", [text], max_length=least + room)
        whole = tokenizer._encode(" " + text)
        body = group.documents[0][: -len(tokenizer.suffix)]
        assert np.array_equal(body, whole[:room])
        assert group.truncated == [len(whole) > room]

    check()
    tried(count)


def test_mixed_marks_sort_as_in_the_whole_text(tried: Callable[[int], None]) -> None:
    """Marks of a low class far behind the part that is read belong in front of it."""
    tokenizer, chance = qwen3_tokenizer(), random.Random(0)
    marks = ["\u0301", "\u0302", "\u0323", "\u05b0", "\u0f71", "\u0f74", "\u0334", "\u302a"]
    least = len(tokenizer.encode_group(None, "q", [], max_length=8192).head) + len(tokenizer.suffix)
    for trial in range(200):
        few = chance.sample(marks, chance.randint(1, 8))
        run = chance.choices(few, weights=[9**i for i in range(len(few))], k=3000)
        text = chance.choice(["e", "a", "", "中", "\u0f40"]) + "".join(run) + "end"
        room = chance.randint(1, 30)
        group = tokenizer.encode_group(None, "q", [text], max_length=least + room)
        whole = tokenizer._encode(" " + text)
        assert np.array_equal(group.documents[0][: -len(tokenizer.suffix)], whole[:room]), trial
    tried(200)


def test_spans_of_a_long_document_cover_it() -> None:
    text = "word " * 200_000
    with bounded(seconds=10, megabytes=250):
        spans = qwen3_tokenizer().token_spans(text)
    assert (spans[0][0], spans[-1][1]) == (0, len(text))
    stops = np.array([spans[i] for i in range(0, len(spans), 1000)])
    assert (np.diff(stops[:, 0]) > 0).all()

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_reranker import InputError, Reranker
from qwen3_reranker.text.steps import finish
from qwen3_reranker.text.windows import fold, split, window_steps
from tests.fakes import FakeModel, loaded, small_tokenizer


@given(st.integers(1, 3000), st.integers(1, 400))
def test_windows_cover_all_tokens_and_none_is_too_long(num_tokens: int, room: int) -> None:
    spans = [(3 * i, 3 * i + 3) for i in range(num_tokens)]
    windows = split(spans, room)
    assert windows[0][0] == 0
    assert windows[-1][1] == 3 * num_tokens
    for start, stop in windows:
        assert 0 < stop - start <= 3 * room
    for (_, stop), (start, _) in pairwise(windows):
        assert start <= stop, "nothing lies between two windows"
        assert room < 2 or num_tokens <= room or start < stop, "they overlap"
    assert len(windows) <= 1 + -(-num_tokens // max(room - max(room // 8, 3), 1))


TEXTS = ["word " * 300, "日本語の文章です。" * 60, "e\u0301🦙 \ud83d tail" * 40, "x" * 900]


@pytest.mark.parametrize("text", TEXTS)
def test_window_is_encoded_as_its_text_alone(text: str) -> None:
    tokenizer = small_tokenizer()
    group, (pieces,), truncated = finish(
        window_steps(tokenizer, None, "q", [text], max_length=128, max_windows=None)
    )
    assert pieces is not None
    assert len(pieces) == len(group.documents) > 2
    assert pieces[-1][1] == len(text)
    assert truncated == [False]
    for (start, stop), ids in zip(pieces, group.documents, strict=True):
        alone = tokenizer.encode_group(None, "q", [text[start:stop]], max_length=128)
        np.testing.assert_array_equal(ids, alone.documents[0])
        whole = tokenizer.encode_group(None, "q", [text[start:stop]], max_length=10_000)
        is_last = stop == len(text)
        assert len(whole.documents[0]) - len(ids) <= (0 if is_last else 3), "in the next window"


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_in_a_window_or_the_document_truncated(text: str) -> None:
    tokenizer = small_tokenizer()
    text = text[:200]
    least = len(tokenizer.encode_group(None, "q", [""], max_length=1000).head) + len(
        tokenizer.suffix
    )
    for room in range(1, 30):
        _, (pieces,), (truncated,) = finish(
            window_steps(tokenizer, None, "q", [text], max_length=least + room, max_windows=None)
        )
        if pieces is None:
            continue
        ends = [0]  # of what has been read without a gap
        for start, stop in pieces:
            spans = tokenizer.token_spans(text[start:stop])
            end = stop if len(spans) <= room else start + spans[room][0]
            if start <= ends[-1]:
                ends.append(max(end, ends[-1]))
        assert truncated == (ends[-1] < len(text))
        assert not truncated or room < 5


def test_surrogate_pairs_are_one_character_in_the_prompt_and_two_in_the_document() -> None:
    tokenizer = small_tokenizer()
    document = "ab \ud83e\udd99 🦙" * 90 + " \ud83d end"
    group, (pieces, short), truncated = finish(
        window_steps(
            tokenizer, None, "q", [document, "\ud83e\udd99"], max_length=128, max_windows=None
        )
    )
    assert (short, truncated, group.num_repaired) == (None, [False, False], 2)
    assert pieces is not None
    assert (pieces[0][0], pieces[-1][1]) == (0, len(document))
    for (start, stop), ids in zip(pieces, group.documents[:-1], strict=True):
        alone = tokenizer.encode_group(None, "q", [document[start:stop]], max_length=128)
        np.testing.assert_array_equal(ids, alone.documents[0])
    for (_, stop), (start, _) in pairwise(pieces):
        assert start < stop


def test_short_documents_are_left_alone() -> None:
    tokenizer = small_tokenizer()
    documents = ["short", TEXTS[0], ""]
    group, pieces, truncated = finish(
        window_steps(tokenizer, None, "q", documents, max_length=128, max_windows=2)
    )
    assert [piece is None for piece in pieces] == [True, False, True]
    assert pieces[1] is not None
    assert len(pieces[1]) == 2
    assert len(group.documents) == 4
    assert truncated == [False, True, False]


def test_fold_names_the_window_that_scored_best() -> None:
    pieces = [[(0, 5), (4, 9)], None, [(0, 3), (2, 6), (5, 8)]]
    log_odds = [1.0, 2.0, 0.5, -1.0, -3.0, -2.0]
    assert fold(log_odds, pieces, "max") == ([2.0, 0.5, -1.0], [(4, 9), None, (0, 3)])
    assert fold(log_odds, pieces, "mean") == ([1.5, 0.5, -2.0], [(4, 9), None, (0, 3)])


def ranked(monkeypatch: pytest.MonkeyPatch, documents: list[str], **settings: Any) -> Any:
    with loaded(monkeypatch, FakeModel()):
        reranker = Reranker("fake", max_length=128, **settings)
        return reranker, reranker.rank("needle", documents)


def test_needle_past_the_limit_is_found_in_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    document = "straw " * 400 + "needle " + "straw " * 50
    reranker, (best, *_) = ranked(monkeypatch, ["straw", document], window_score="max")
    assert (best.index, best.truncated) == (1, False)
    assert best.window is not None
    assert "needle" in document[slice(*best.window)]
    assert reranker.usage.documents == 2
    _, results = ranked(monkeypatch, ["straw", document])
    assert {result.window for result in results} == {None}
    assert [result.truncated for result in results if result.index == 1] == [True]
    _, (first, *_) = ranked(monkeypatch, [document], window_score="max", max_windows=2)
    assert first.truncated


def test_windows_survive_pickling_and_wrong_values_are_refused() -> None:
    import pickle

    reranker = Reranker("fake", max_length=99, window_score="mean", max_windows=3)
    assert pickle.loads(pickle.dumps(reranker))._limits == reranker._limits  # noqa: S301
    with pytest.raises(InputError, match="window_score must be 'max', 'mean' or None, got 'min'"):
        Reranker("fake", window_score="min")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_windows must be an integer of at least 1"):
        Reranker("fake", window_score="max", max_windows=0)
    with pytest.raises(InputError, match=r"max_windows is 3, but without window_score"):
        Reranker("fake", max_windows=3)

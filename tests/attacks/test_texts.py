"""Texts that are no plain strings, numbers that are no seconds, files that unpack."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_reranker import Calibration, DataError, InputError, Reranker
from qwen3_reranker.bulk import score_columns
from qwen3_reranker.data.documents import read_documents
from tests import fakes
from tests.attacks.limits import bounded
from tests.fakes import FRUIT, QUERY, head_ids

pytestmark = pytest.mark.attack


class Liar(str):
    """Says something else whenever it is asked."""

    __slots__ = ()

    def __add__(self, other: str) -> str:
        return "lie"

    __radd__ = __add__
    __str__ = __format__ = __repr__ = lambda self, *_: "lie"

    def encode(self, *arguments: Any) -> bytes:  # type: ignore[override]
        return b"lie"

    def strip(self, *arguments: Any) -> str:  # type: ignore[override]
        return "lie"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


KINDS: list[Callable[[str], str]] = [markupsafe.Markup, np.str_, Liar]


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_a_subclass_is_its_characters(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[[str], str]
) -> None:
    instruction = "Find <fruit> & more"
    plain: dict[str, Any] = {"instruction": instruction}
    other: dict[str, Any] = {"instruction": kind(instruction)}
    model = fakes.FakeModel()
    with fakes.loaded(monkeypatch, model):
        reranker, query = Reranker("model"), kind(QUERY)
        documents = [kind(document) for document in FRUIT]
        expected = reranker.score(QUERY, FRUIT, **plain)
        assert reranker.score(query, documents, **other) == expected
        assert reranker.score_pairs([(query, d) for d in documents], **other) == expected
        (ranked,) = reranker.rank_many([query], [documents], instruction=[kind(instruction)])
        assert [r.score for r in ranked] == sorted(expected, reverse=True)
        assert all(type(r.document) is str for r in ranked)
        assert Reranker("model", **other).score(query, documents) == expected
        batch = {
            "query": [query] * 5,
            "document": documents,
            "instruction": [kind(instruction)] * 5,
        }
        assert score_columns(reranker, batch)["score"].tolist() == expected
        assert {tuple(head) for head in model.network.heads} == {
            tuple(head_ids(instruction, QUERY))
        }


@pytest.mark.parametrize(
    "documents",
    [pd.DataFrame({"text": FRUIT}), {"text": "a"}, {"a"}, b"bytes", "text", np.array("text"),
     np.array([["a", "b"]]), 7, None, [b"a"], [None], [["a"]], [7], [math.nan], object()],
)  # fmt: skip
def test_what_is_no_list_of_texts_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, documents: Any
) -> None:
    model = fakes.FakeModel()
    with fakes.loaded(monkeypatch, model), bounded(seconds=2, megabytes=20):
        for call in (Reranker("model").rank, Reranker("model").score):
            with pytest.raises(InputError, match="documents"):
                call(QUERY, documents)
    assert model.network.packs == []


@pytest.mark.parametrize(
    "documents", [pd.Series(FRUIT), np.array(FRUIT), tuple(FRUIT), iter(FRUIT), (d for d in FRUIT)]
)
def test_what_is_a_list_of_texts_is_taken(monkeypatch: pytest.MonkeyPatch, documents: Any) -> None:
    with fakes.loaded(monkeypatch, fakes.FakeModel()):
        reranker = Reranker("model")
        assert reranker.score(QUERY, documents) == reranker.score(QUERY, FRUIT)


@pytest.mark.parametrize(
    "timeout_s",
    [math.inf, 1e10, 1e300, 10**400, np.float64("inf"), np.int64(60), np.float32(60), 60],
)
async def test_any_number_of_seconds_can_be_waited(
    monkeypatch: pytest.MonkeyPatch, timeout_s: Any
) -> None:
    with fakes.loaded(monkeypatch, fakes.FakeModel()):
        reranker = Reranker("model")
        assert reranker.score(QUERY, FRUIT, timeout_s=timeout_s)
        assert await reranker.ascore(QUERY, FRUIT, timeout_s=timeout_s)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, -(10**400), "1", None])
@pytest.mark.parametrize("name", ["temperature", "bias"])
def test_calibration_that_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError):
        Calibration(**{"temperature": 1.0, "bias": 0.0, name: value})


def _packed(folder: Path, name: str, megabytes: int, line: bytes) -> Path:
    file = folder / name
    opener: Any = gzip.open if name.endswith(".gz") else lzma.open
    with opener(file, "wb") as packed:
        block = line * (1024 * 1024 // len(line))
        for _ in range(megabytes):
            packed.write(block)
    return file


@pytest.mark.parametrize("ending", [".gz", ".xz"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
@pytest.mark.parametrize(
    "line", [b" ", b"x" * 1023 + b"\n", b"x\n"], ids=["one line", "lines", "short lines"]
)
def test_small_file_that_unpacks_to_gigabytes_is_refused(
    tmp_path: Path, ending: str, kind: str, line: bytes
) -> None:
    file = _packed(tmp_path, f"bomb{kind}{ending}", 300, line)
    assert file.stat().st_size < 2_000_000
    with bounded(seconds=20, megabytes=400), pytest.raises(DataError):
        read_documents(str(file), max_bytes=64 * 1024 * 1024)


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".txt.gz", ".jsonl.xz"])
def test_any_bytes_are_documents_or_our_error(
    tmp_path: Path, kind: str, tried: Callable[[int], None]
) -> None:
    file, count = tmp_path / f"file{kind}", 0
    opener: Any = {"gz": gzip.open, "xz": lzma.open}.get(kind[-2:], open)
    # Bytes that mean something to a reader, beside any.
    pieces = st.sampled_from(
        [b'{"text": "a"}', b'{"text": 1e999}', b'"', b"\n", b"\r", b",", b"text,id\n", b"\x00",
         b"\xff", b"[" * 3000, b'{"text":', b"\\ud83d", b"1" * 5000, b"\xef\xbb\xbf", b"NaN", b"}"]
    )  # fmt: skip

    @settings(
        max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(pieces | st.binary(max_size=8), max_size=8))
    def check(content: list[bytes]) -> None:
        nonlocal count
        count += 1
        with opener(file, "wb") as opened:
            opened.write(b"".join(content))
        try:
            documents = read_documents(str(file))
        except DataError:
            return
        assert all(isinstance(document.text, str) for document in documents)

    check()
    tried(count)

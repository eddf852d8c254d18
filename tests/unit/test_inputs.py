from __future__ import annotations

import asyncio
import math
import os
import re
import time
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import Mock, NonCallableMock

import numpy as np
import pytest

from qwen3_reranker import TEMPLATES, InputError, PromptTemplate, Reranker
from qwen3_reranker.call import arguments
from tests import fakes

CANARY = "CANARY text of a document"
Call = Callable[[Reranker], Any]


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.forbid_loading(monkeypatch)


def rank(documents: Any = (CANARY,), query: Any = CANARY, **settings: Any) -> Call:
    return lambda reranker: reranker.rank(query, documents, **settings)


def rank_many(queries: Any, documents: Any, **settings: Any) -> Call:
    return lambda reranker: reranker.rank_many(queries, documents, **settings)


def pairs(value: Any, **settings: Any) -> Call:
    return lambda reranker: reranker.score_pairs(value, **settings)


BAD_DOCUMENTS = [
    (rank([CANARY, None]), "documents[1] must be a string, got NoneType"),
    (rank([7, CANARY]), "documents[0] must be a string, got int"),
    (rank([CANARY, CANARY, 0.5]), "documents[2] must be a string, got float"),
    (rank([math.nan]), "documents[0] must be a string, got float"),
    (rank([CANARY.encode()]), "documents[0] must be a string, got bytes"),
    (rank([{"text": CANARY}]), "documents[0] must be a string, got dict"),
    (rank([CANARY, [CANARY, CANARY]]), "documents[1] must be a string, got list"),
    (rank([(CANARY, CANARY)]), "documents[0] must be a string, got tuple"),
    (rank([None, CANARY, 3, []]), "documents[0] must be a string, got NoneType and 2 more"),
    (
        lambda reranker: reranker.rank("q", (t for t in (CANARY, None))),
        "documents[1] must be a string, got NoneType",
    ),
    (rank(CANARY), "documents must be a list of strings, got str"),
    (rank(CANARY.encode()), "documents must be a list of strings, got bytes"),
    (rank({CANARY}), "documents must be a list of strings, got set"),
    (rank(frozenset([CANARY])), "documents must be a list of strings, got frozenset"),
    (rank({CANARY: 1}), "documents must be a list of strings, got dict"),
    (rank({CANARY: 1}.keys()), "documents must be a list of strings, got dict_keys"),
    (rank(None), "documents must be a list of strings, got NoneType"),
    (rank(3), "documents must be a list of strings, got int"),
]
BAD_QUERIES = [
    (rank(query=None), "query must be a string, got NoneType"),
    (rank(query=7), "query must be a string, got int"),
    (rank(query=CANARY.encode()), "query must be a string, got bytes"),
    (rank(query=[CANARY]), "query must be a string, got list"),
    (rank(query=""), "query is blank (0 characters)"),
    (rank(query=" \n\t"), "query is blank (3 characters)"),
    (rank([], query=""), "query is blank (0 characters)"),
]
BAD_CUTS = [
    (rank(top_n=0), "top_n must be an integer of at least 1 or None, got 0"),
    (rank(top_n=-1), "got -1"),
    (rank(score_threshold=10**400), "score_threshold must be between 0 and 1 or None"),
    (rank(top_n=True), "top_n must be an integer of at least 1 or None, got True"),
    (rank(top_n=1.5), "got 1.5"),
    (rank(top_n="3"), "top_n must be an integer of at least 1 or None, got str"),
    (rank([], top_n=0), "top_n must be an integer of at least 1 or None, got 0"),
    (rank(score_threshold=math.nan), "score_threshold must be between 0 and 1 or None, got nan"),
    (rank(score_threshold=math.inf), "got inf"),
    (rank(score_threshold=-0.1), "got -0.1"),
    (rank(score_threshold=1.1), "got 1.1"),
    (rank(score_threshold=True), "score_threshold must be between 0 and 1 or None, got True"),
    (rank(score_threshold="0.5"), "score_threshold must be between 0 and 1 or None, got str"),
    (rank_many([CANARY], [[CANARY]], top_n=0), "top_n must be an integer of at least 1"),
    (rank_many([], [], score_threshold=2), "score_threshold must be between 0 and 1"),
]
BAD_INSTRUCTIONS = [
    (rank(instruction=3), "instruction must be a string or None, got int"),
    (rank(instruction=CANARY.encode()), "instruction must be a string or None, got bytes"),
    (pairs([(CANARY, CANARY)], instruction={}), "instruction must be a string or None, got dict"),
    (
        rank_many([CANARY] * 3, [[]] * 3, instruction=[CANARY] * 2),
        "instruction must be one string or one per query, got 2 for 3 queries. Pass one string",
    ),
    (
        rank_many([CANARY] * 2, [[]] * 2, instruction=[None, 3]),
        "instruction[1] must be a string or None, got int",
    ),
]
BAD_LISTS = [
    (rank_many([CANARY] * 2, [[CANARY]]), "got 2 queries and 1 lists of documents"),
    (rank_many([], [[CANARY]]), "got 0 queries and 1 lists of documents"),
    (rank_many([CANARY], []), "got 1 queries and 0 lists of documents"),
    (rank_many(CANARY, [[CANARY]]), "queries must be a list of strings, got str"),
    (rank_many([CANARY] * 2, [CANARY] * 2), "documents must be a list of lists, one per query"),
    (rank_many(None, []), "queries must be a list of strings, got NoneType"),
    (rank_many([CANARY], CANARY), "documents must be a list of lists of strings"),
    (rank_many([CANARY] * 2, [[], None]), "documents[1] must be a list of strings, got NoneType"),
    (rank_many([CANARY] * 2, [[CANARY], [CANARY, 3]]), "documents[1][1] must be a string, got int"),
    (rank_many([CANARY, 3], [[], []]), "queries[1] must be a string, got int"),
    (rank_many([CANARY, " "], [[], []]), "queries[1] is blank (1 characters)"),
]
BAD_PAIRS = [
    (pairs([("q", CANARY, CANARY)]), "pairs[0] must be a (query, document) pair, got tuple of 3"),
    (pairs([("q", None)]), "document of pairs[0] must be a string, got NoneType"),
    (pairs([("q", CANARY)], instruction=["i"]), "instruction must be a string or None, got list"),
    (rank(instruction=["i"]), "instruction must be a string or None, got list"),
    (pairs(CANARY), "pairs must be a list of (query, document) pairs, got str"),
    (pairs({CANARY: CANARY}), "pairs must be a list of (query, document) pairs, got dict"),
    (pairs(None), "pairs must be a list of (query, document) pairs, got NoneType"),
    (pairs([(CANARY, CANARY), CANARY]), "pairs[1] must be a (query, document) pair, got str"),
    (pairs(["ab"]), "pairs[0] must be a (query, document) pair, got str"),
    (pairs([None]), "pairs[0] must be a (query, document) pair, got NoneType"),
    (pairs([(CANARY,)]), "pairs[0] must be a (query, document) pair"),
    (pairs([(CANARY, CANARY, CANARY)]), "pairs[0] must be a (query, document) pair"),
    (pairs([{CANARY, "b"}]), "pairs[0] must be a (query, document) pair, got set"),
    (pairs([(CANARY, CANARY), (3, CANARY)]), "query of pairs[1] must be a string, got int"),
    (pairs([("", CANARY)]), "query of pairs[0] is blank"),
    (pairs([(CANARY, CANARY), (CANARY, None)]), "document of pairs[1]"),
]
BAD_CALLS = [
    *BAD_DOCUMENTS, *BAD_QUERIES, *BAD_CUTS, *BAD_INSTRUCTIONS, *BAD_LISTS, *BAD_PAIRS
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "fragment"), BAD_CALLS, ids=[fragment for _, fragment in BAD_CALLS]
)
def test_bad_call_is_named_before_any_model_work(call: Call, fragment: str) -> None:
    with pytest.raises(InputError, match=re.escape(fragment)) as caught:
        call(Reranker("model"))
    assert isinstance(caught.value, ValueError)
    error: BaseException | None = caught.value
    while error is not None:
        assert "CANARY" not in repr(error)
        error = error.__cause__ or error.__context__


def test_bad_calls_are_refused_at_once() -> None:
    reranker, seconds = Reranker("model"), []
    for call, _ in BAD_CALLS:
        start = time.perf_counter()
        with pytest.raises(InputError):
            call(reranker)
        seconds.append(time.perf_counter() - start)
    print(f"{len(seconds)} bad calls, {1000 * median(seconds):.2f} ms each, no model asked for")
    assert len(seconds) >= 40
    assert median(seconds) < 0.01


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"model": ""}, "model is blank. Pass a Hub name"),
        ({"model": " "}, "model is blank"),
        ({"model": 3}, "model must be a Hub name or a path, got int"),
        ({"model": None}, "model must be a Hub name or a path, got NoneType"),
        ({"model": b"model"}, "model must be a Hub name or a path, got bytes"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0. Leave it out"),
        ({"max_length": -1}, "max_length must be an integer of at least 1, got -1"),
        ({"max_length": 1.5}, "max_length must be an integer of at least 1, got 1.5"),
        ({"max_length": True}, "max_length must be an integer of at least 1, got True"),
        ({"max_length": None}, "max_length must be an integer of at least 1, got None"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be an integer of at least 1, got 0"),
        ({"max_batch_tokens": "9"}, "max_batch_tokens must be an integer of at least 1, got str"),
        (
            {"dtype": "int4"},
            "dtype must be one of float32, bfloat16, float16, int8, nf4 or None, got 'int4'",
        ),
        (
            {"dtype": 16},
            "dtype must be one of float32, bfloat16, float16, int8, nf4 or None, got 16",
        ),
        ({"adapter": ""}, "adapter is blank"),
        ({"adapter": 3}, "adapter must be a Hub name or a path, got int"),
        ({"template": "none"}, "template must be one of qwen3-reranker, published-eval, chatml"),
        ({"template": ["chatml"]}, "template must be one of"),
        ({"revision": 3}, "revision must be a string or None, got int. Use None for the default"),
        ({"device": 0}, "device must be a string or None, got int"),
        ({"template": 3}, "template must be one of qwen3-reranker, published-eval, chatml"),
        ({"instruction": 3}, "instruction must be a string or None, got int"),
        ({"instruction": b"x"}, "instruction must be a string or None, got bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("make", [Reranker, Reranker.shared], ids=["constructor", "shared"])
def test_bad_setting_is_named_before_any_model_work(
    make: Callable[..., Reranker], settings: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(InputError, match=re.escape(fragment)):
        make(**{"model": "model", **settings})


@pytest.mark.parametrize("verb", ["arank", "ascore"])
async def test_async_verbs_refuse_what_sync_verbs_refuse(verb: str) -> None:
    with pytest.raises(InputError, match=r"documents\[1\] must be a string, got NoneType"):
        await getattr(Reranker("model"), verb)("q", ["a", None])


async def test_arank_refuses_a_bad_cut() -> None:
    with pytest.raises(InputError, match="got 0"):
        await Reranker("model").arank("q", ["a"], top_n=0)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda reranker: reranker.rank("q", []), []),
        (lambda reranker: reranker.rank("q", (), top_n=3, score_threshold=0.5), []),
        (lambda reranker: reranker.rank("q", iter(())), []),
        (lambda reranker: reranker.score("q", []), []),
        (lambda reranker: reranker.rank_many([], []), []),
        (lambda reranker: reranker.rank_many(["a", "b"], [[], []]), [[], []]),
        (lambda reranker: reranker.rank_many([], [], instruction=[]), []),
        (lambda reranker: reranker.score_pairs([]), []),
        (lambda reranker: asyncio.run(reranker.arank("q", [])), []),
        (lambda reranker: asyncio.run(reranker.ascore("q", [])), []),
    ],
)
def test_no_documents_need_no_model(call: Call, expected: list[Any]) -> None:
    reranker = Reranker("model")
    assert call(reranker) == expected
    assert reranker.usage.documents == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"model": Path("folder") / "model"},
        {"dtype": "bfloat16"},
        {"dtype": None},
        {"max_length": np.int64(512)},
        {"max_batch_tokens": 1},
        {"instruction": ""},
        {"template": "chatml"},
        {"template": TEMPLATES["published-eval"]},
    ],
)
def test_good_settings_are_accepted(settings: dict[str, Any]) -> None:
    Reranker(**{"model": "model", **settings})


def test_path_like_objects_are_taken_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (entry,) = os.scandir(tmp_path)
    assert arguments.check_path("model", entry) == str(tmp_path / "model")


@pytest.mark.parametrize("top_n", [None, 1, 10**9, np.int64(3)])
@pytest.mark.parametrize("score_threshold", [None, 0, 0.0, 0.5, 1, np.float32(0.5)])
def test_good_cuts_are_accepted(top_n: Any, score_threshold: Any) -> None:
    assert Reranker("model").rank("q", [], top_n=top_n, score_threshold=score_threshold) == []


def test_torch_dtypes_are_accepted() -> None:
    import torch

    Reranker("model", dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"got torch\.int16"):
        Reranker("model", dtype=torch.int16)


@pytest.mark.parametrize("kind", [str, list, tuple, int, float, bool, PromptTemplate])
@pytest.mark.parametrize("mock", [Mock, NonCallableMock])
def test_mock_that_claims_a_class_is_refused_at_every_door(mock: Any, kind: type) -> None:
    fake = mock(spec=kind)
    assert isinstance(fake, kind)  # what it claims
    reranker = Reranker("model")
    calls: list[Callable[[], Any]] = [
        lambda: reranker.rank(fake, ["d"]),
        lambda: reranker.rank("q", fake),
        lambda: reranker.rank("q", [fake]),
        lambda: reranker.rank("q", ["d"], instruction=fake),
        lambda: reranker.rank("q", ["d"], top_n=fake),
        lambda: reranker.rank("q", ["d"], score_threshold=fake),
        lambda: reranker.rank("q", ["d"], timeout_s=fake),
        lambda: reranker.rank_many(["q"], [fake]),
        lambda: reranker.rank_many(["q"], [["d"]], instruction=fake),
        lambda: reranker.score_pairs([fake]),
        lambda: reranker.score_pairs([("q", fake)]),
        *(
            lambda name=name: Reranker(**{"model": "m", name: fake})
            for name in ("model", "adapter", "dtype", "device", "template", "revision", "exact",
                         "max_length", "window_score", "calibration", "instruction")
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize(
    "documents",
    [bytearray(), memoryview(b""), array("d"), np.array([], np.int64), range(0),
     np.array([], "M8[s]"), np.array([], bool), np.array([], "S3")],
)  # fmt: skip
def test_nothing_of_what_holds_no_texts_is_not_no_documents(documents: Any) -> None:
    kind = type(documents).__name__
    with pytest.raises(InputError, match=f"documents must be a list of strings, got {kind}"):
        Reranker("model").rank("q", documents)


def test_nothing_of_torch_is_not_no_documents() -> None:
    import torch

    with pytest.raises(InputError, match="documents must be a list of strings, got Tensor"):
        Reranker("model").rank("q", torch.empty(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "documents",
    [np.array([]), np.array([], str), np.array([], object), deque(), array("u")[:0].tolist()],
)
def test_nothing_of_what_could_hold_texts_is_no_documents(documents: Any) -> None:
    assert Reranker("model").rank("q", documents) == []


HUGE = 10**5000
"""Python refuses to print it."""


@pytest.mark.parametrize("value", [HUGE, -HUGE], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "name",
    ["model", "adapter", "dtype", "device", "template", "revision", "exact", "max_length",
     "max_batch_tokens", "max_windows", "window_score", "calibration", "instruction"],
)  # fmt: skip
def test_number_that_cannot_be_printed_is_refused_as_a_setting(name: str, value: int) -> None:
    with pytest.raises(InputError) as caught:
        Reranker(**{"model": "m", name: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int8, np.uint64])
def test_numbers_of_numpy_are_compared_without_a_warning(kind: Callable[[int], Any]) -> None:
    reranker = Reranker("model")
    options: dict[str, Any] = {"timeout_s": kind(60), "score_threshold": kind(1)}
    assert reranker.rank("q", [], **options) == []


def test_number_that_cannot_be_printed_is_refused_in_a_call() -> None:
    reranker = Reranker("model")
    for options in ({"score_threshold": HUGE}, {"top_n": -HUGE}, {"timeout_s": -HUGE}):
        with pytest.raises(InputError, match=r"got int of 16610 bits"):
            reranker.rank("q", ["d"], **options)  # type: ignore[arg-type]
    assert reranker.rank("q", [], top_n=HUGE) == []


@pytest.mark.parametrize("value", ["no", ["CANARY"], np.array(["max", "mean"]), {"CANARY": 1}])
def test_word_of_several_is_never_compared_by_the_values_own_rules(value: Any) -> None:
    for name in ("window_score", "dtype", "template"):
        with pytest.raises(InputError, match=f"{name} must be") as caught:
            Reranker(**{"model": "m", name: value})
        assert "CANARY" not in str(caught.value)
    with pytest.raises(InputError, match="way must be one of a, b"):
        arguments.check_choice("way", value, ("a", "b"))


def test_word_of_a_subclass_is_its_characters() -> None:
    class Liar(str):
        __slots__ = ()
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = lambda self: hash("chatml")  # type: ignore[assignment]  # noqa: E731
        __str__ = __repr__ = lambda self: "lie"

    for name in ("window_score", "dtype", "template"):
        with pytest.raises(InputError, match=f"{name} must be"):
            Reranker(**{"model": "m", name: Liar("other")})
    assert arguments.check_choice("way", Liar("b"), ("a", "b")) == "b"
    assert type(arguments.check_path("model", Liar("folder"))) is str


@pytest.mark.parametrize("dtype", [str, object])
def test_array_of_two_dimensions_is_a_list_of_each_querys_documents(dtype: Any) -> None:
    rows = [["a", "b"], ["c", "d"]]
    assert arguments.check_lists(["q", "r"], np.array(rows, dtype)) == (["q", "r"], rows)

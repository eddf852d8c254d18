"""Rows of training files that are refused: which, why, and what is left."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import (
    TrainingFile,
    TrainingGroup,
    read_training_file,
)
from qwen3_reranker import DataError
from tests.training_files import FLAG, OURS, PAIR, SWIFT, answer, system, write

# What is refused: name, lines, line of the fault, reason.

CUT = json.dumps(OURS)[:-5]
LINE = json.dumps(OURS).replace('"q"', '"other"')
MALFORMED: list[tuple[str, list[Any], int, str]] = [
    ("not JSON", ["{'query': 1}"], 1, "not JSON at column 2"),
    ("two objects", [json.dumps(OURS) * 2], 1, "not JSON at column 65: Extra data"),
    ("not an object", [[OURS]], 1, "must be an object, got list"),
    ("string", ['"text"'], 1, "must be an object, got str"),
    ("duplicate key", ['{"query": "a", "query": "b"}'], 1, "a key is given twice"),
    ("lone surrogate", [json.dumps({**OURS, "query": "\ud800"})], 1, "lone surrogate"),
    ("surrogate in a document", [{**OURS, "negative": ["\udc00"]}], 1, "lone surrogate"),
    ("cut last line", [LINE, CUT], 2, "not JSON at column 56"),
    ("Latin-1", [LINE, b'{"query": "caf\xe9"}', LINE], 2, "byte 15 is not UTF-8"),
    ("UTF-16", ["{}".encode("utf-16")], 1, "byte 1 is not UTF-8"),
    ("NaN", ['{"query": NaN}'], 1, "NaN is not a number"),
    ("too large", ['{"query": 1e999}'], 1, "1e999 is too large"),
    ("no query", [{"positive": ["a"], "negative": ["b"]}], 1, "'query' must be a string that"),
    ("null query", [{**OURS, "query": None}], 1, "'query' must be a string that is not blank"),
    ("number as query", [LINE, {**OURS, "query": 7}], 2, "is not blank, got int"),
    ("list as query", [{**OURS, "query": ["q"]}], 1, "is not blank, got list"),
    ("blank query", [{**OURS, "query": " \t"}], 1, "is not blank, got a blank one"),
    (
        "instruction type",
        [{**OURS, "instruction": 3}],
        1,
        "'instruction' must be a string, got int",
    ),
    ("no positive", [{"query": "q", "negative": ["b"]}], 1, "'positive' must be a list of at"),
    ("no negative", [{"query": "q", "positive": ["b"]}], 1, "at least one string, got nothing"),
    ("empty positive", [{**OURS, "positive": []}], 1, "at least one string, got an empty one"),
    ("empty negative", [{**OURS, "negative": []}], 1, "'negative' must be a list of at least"),
    ("string as list", [{**OURS, "positive": "a"}], 1, "at least one string, got str"),
    ("null document", [{**OURS, "positive": ["a", None]}], 1, "positive[1] must be a string that"),
    ("list document", [{**OURS, "positive": [["a"]]}], 1, "positive[0] must be a string that"),
    ("blank document", [{**OURS, "negative": ["a", "\n"]}], 1, "negative[1] must be a string that"),
    ("empty document", [{**OURS, "negative": [""]}], 1, "not blank, got a blank one"),
    ("unknown key", [{**OURS, "scroes": {}}], 1, "unknown key 'scroes'; did you mean 'scores'?"),
    ("plural key", [{"query": "q", "positives": ["a"]}], 1, "did you mean 'positive'?"),
    ("evaluation row", [{"query": "q", "candidates": []}], 1, "pass this file as --eval_file"),
    ("far key", [{**OURS, "zzz": 1}], 1, "unknown key 'zzz'; known are instruction, negative"),
    ("mixed keys", [{"query": "q", "pos": ["a"], "negs": ["b"]}], 1, "did you mean 'neg'?"),
    ("repeat", [{**OURS, "positive": ["a", "b", "a"]}], 1, "positive[2] repeats positive[0]"),
    ("contradiction", [{**OURS, "negative": ["b", "yes"]}], 1, "negative[1] is positive[0] too"),
    (
        "contradiction across rows",
        [OURS, LINE, {**OURS, "positive": ["sure", "never"], "negative": ["not"]}],
        3,
        "positive[1] is irrelevant to the same query on line 1",
    ),
    (
        "sibling positive as negative",
        [OURS, {**OURS, "positive": ["sure"], "negative": ["yes"]}],
        2,
        "negative[0] is relevant to the same query on line 1",
    ),
    (
        "scores type",
        [{**OURS, "scores": [1, 2, 3]}],
        1,
        "'scores' must be an object with the lists",
    ),
    (
        "scores key",
        [{**OURS, "scores": {"pos": [1]}}],
        1,
        "unknown key 'pos'; known are negative, positive",
    ),
    (
        "scores of other length",
        [{**OURS, "scores": {"positive": [1], "negative": [1]}}],
        1,
        "scores.negative must be a list of 2, a score per document, got 1",
    ),
    (
        "scores of one side",
        [{**OURS, "scores": {"positive": [1]}}],
        1,
        "scores.negative must be a list of 2, a score per document, got nothing",
    ),
    (
        "boolean score",
        [{**OURS, "scores": {"positive": [True], "negative": [1, 2]}}],
        1,
        "scores.positive[0] must be a finite number, got bool",
    ),
    (
        "enormous score",
        [{**OURS, "scores": {"positive": [10**400], "negative": [1, 2]}}],
        1,
        "scores.positive[0] must be a finite number, got int",
    ),
    (
        "infinite score",
        ['{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [Infinity]}'],
        1,
        "Infinity is not a number",
    ),
    ("FlagEmbedding scores", [{**FLAG, "neg_scores": [1, 2]}], 1, "pos_scores must be a list of 1"),
    ("FlagEmbedding prompt", [{**FLAG, "prompt": []}], 1, "'prompt' must be a string, got list"),
    ("FlagEmbedding empty", [{**FLAG, "neg": []}], 1, "'neg' must be a list of at least one"),
    ("no label", [{"query": "q", "document": "d"}], 1, "'label' must be yes or no"),
    ("label word", [{**PAIR, "label": "Yes"}], 1, "of at least 0, got another string"),
    ("negative label", [{**PAIR, "label": -1}], 1, "'label' must be yes or no, true or false"),
    ("soft label", [{**PAIR, "label": 0.5}], 1, "of at least 0, got float"),
    ("NaN label", ['{"query": "q", "document": "d", "label": NaN}'], 1, "NaN is not a number"),
    ("no document", [{"query": "q", "label": 1}], 1, "'document' must be a string that"),
    ("blank pair", [{**PAIR, "document": " "}], 1, "'document' must be a string that is not"),
    ("pair repeats", [PAIR, {**PAIR, "query": "r"}, PAIR], 3, "the pair of line 1 again"),
    (
        "pair contradicts",
        [PAIR, {**PAIR, "query": "r"}, {**PAIR, "label": 0}],
        3,
        "'document' is relevant to the same query on line 1; decide",
    ),
    (
        "pair contradicts otherwise",
        [{**PAIR, "label": False}, PAIR],
        2,
        "'document' is irrelevant to the same query on line 1",
    ),
    (
        "two layouts",
        [OURS, LINE, FLAG],
        3,
        "the row is query/pos/neg, but line 1 is query/positive/negative; keep one layout",
    ),
    ("messages and query", [{**SWIFT, "query": "q"}], 1, "unknown key 'query'"),
    ("no messages", [{**SWIFT, "messages": None}], 1, "messages must be a list of objects with"),
    ("messages of text", [{**SWIFT, "messages": ["q"]}], 1, "messages must be a list of objects"),
    ("no user", [{**SWIFT, "messages": [system("x")]}], 1, "messages must be one message of role"),
    ("no turn", [{**SWIFT, "messages": []}], 1, "messages must be one message of role user"),
    (
        "late system",
        [{**SWIFT, "messages": [*SWIFT["messages"], system("x")]}],
        1,
        "after at most one of role system",
    ),
    (
        "system type",
        [{**SWIFT, "messages": [{"role": "system"}, *SWIFT["messages"]]}],
        1,
        "messages[0].content must be a string, got nothing",
    ),
    (
        "dialogue",
        [{**SWIFT, "positive_messages": [answer("q", "user") + answer("yes")]}],
        1,
        "positive_messages[0] must be one message of role assistant or user",
    ),
    (
        "message key",
        [{**SWIFT, "messages": [{"role": "user", "contents": "q"}]}],
        1,
        "unknown key 'contents'; did you mean 'content'?",
    ),
    (
        "content of parts",
        [{**SWIFT, "negative_messages": [answer([{"type": "text", "text": "no"}])]}],
        1,
        "negative_messages[0][0].content must be a string that is not blank, got list",
    ),
    (
        "messages not nested",
        [{**SWIFT, "positive_messages": answer("yes")}],
        1,
        "positive_messages[0] must be a list of objects with 'role' and 'content'",
    ),
    (
        "no negative messages",
        [{**SWIFT, "negative_messages": []}],
        1,
        "'negative_messages' must be a list of at least one list of messages, got an empty one",
    ),
    (
        "message contradiction",
        [{**SWIFT, "negative_messages": [answer("yes")]}],
        1,
        "negative_messages[0] is positive_messages[0] too",
    ),
    (
        "instruction of one document",
        [{**SWIFT, "positive_messages": [[system("x"), *answer("yes")]]}],
        1,
        "a group has one instruction. Move it into 'messages'",
    ),
]


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [case[1:] for case in MALFORMED],
    ids=[case[0] for case in MALFORMED],
)
def test_malformed_rows_are_named_with_file_line_and_reason(
    tmp_path: Path, lines: list[Any], line: int, reason: str
) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(DataError) as caught:
        read_training_file(path)
    head, fault = str(caught.value).splitlines()
    assert head == f"{path} has 1 fault; nothing was done:"
    assert fault.startswith(f"  {path}:{line}: ")
    assert reason in fault
    path = write(tmp_path, *lines, *({**row, "query": "more"} for row in (OURS, PAIR, FLAG)))
    file = read_training_file(path, skip_bad=True)
    assert file.rejected[0] == fault.strip()
    assert file.num_rows + len(file.rejected) == file.num_lines == len(lines) + 3


def test_there_are_thirty_malformed_fixtures() -> None:
    assert len(MALFORMED) >= 30
    assert len({case[0] for case in MALFORMED}) == len(MALFORMED)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        OURS,
        '{"query": "a", "query": "b"}',
        "",
        {**OURS, "positive": []},
        b"\xff",
        FLAG,
        "[]",
        CUT,
    )
    with pytest.raises(DataError) as caught:
        read_training_file(path)
    head, *faults = str(caught.value).splitlines()
    assert head == f"{path} has 6 faults; nothing was done:"
    assert [fault.split(": ")[0] for fault in faults] == [
        f"  {path}:{line}" for line in (2, 4, 5, 6, 7, 8)
    ]


def test_skip_bad_keeps_reasons_and_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, {**FLAG, "pos": []}, OURS, "", "{", LINE, FLAG, b"\xff\xfe")
    file = read_training_file(path, skip_bad=True)
    assert [group.query for group in file.groups] == ["q", "other"]
    assert (file.num_lines, file.num_rows) == (6, 2)
    assert [reason.split(": ")[0] for reason in file.rejected] == [
        f"{path}:{line}" for line in (1, 4, 6, 7)
    ]


def test_skip_bad_of_a_contradiction_the_first_row_stays(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR, {**PAIR, "label": "no"}, {**PAIR, "document": "e", "label": "no"})
    file = read_training_file(path, skip_bad=True)
    assert file.groups == [TrainingGroup("q", ["d"], ["e"], None)]
    assert len(file.rejected) == 1


def test_a_refused_row_leaves_no_trace(tmp_path: Path) -> None:
    half = {**OURS, "positive": ["new", "never"], "negative": ["x"]}  # contradicts line 1
    path = write(tmp_path, OURS, half, {**OURS, "positive": ["sure"], "negative": ["new"]})
    file = read_training_file(path, skip_bad=True)
    assert [reason.split(":")[1] for reason in file.rejected] == ["2"]
    assert file.num_rows == 2


def test_a_refused_row_does_not_decide_the_layout(tmp_path: Path) -> None:
    path = write(tmp_path, {**OURS, "positive": []}, FLAG, {"query": "q"})
    with pytest.raises(DataError) as caught:
        read_training_file(path)
    _, first, third = str(caught.value).splitlines()
    assert "'positive' must be" in first
    assert third.startswith(f"  {path}:3: 'pos' must be")


def test_skip_bad_without_a_good_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 2 faults; nothing was done"):
        read_training_file(write(tmp_path, "{", "[]"), skip_bad=True)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_has_zero_rows(tmp_path: Path, content: str, skip_bad: bool) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=r"^0 rows in .*train\.jsonl"):
        read_training_file(path, skip_bad=skip_bad)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read: it is not a file"):
        read_training_file(str(tmp_path / name))


def test_standard_input_is_refused() -> None:
    with pytest.raises(DataError, match="- cannot be read: it is not a file"):
        read_training_file("-")


def test_cut_archive_is_refused_even_with_skip_bad(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(OURS).encode())[:-4])
    with pytest.raises(DataError, match="cannot be read"):
        read_training_file(str(file), skip_bad=True)


def test_faults_never_quote_texts(tmp_path: Path) -> None:
    canary = "CANARY"
    rows = [
        {"query": canary, "positive": [canary], "negative": [canary]},
        {"query": canary, "positive": [canary, 1], "negative": [canary]},
        {"query": canary, "positive": canary, "negative": [canary]},
        {"query": canary, "positive": [canary, canary], "negative": ["a"]},
        {"query": canary, "document": canary, "label": canary},
        {"messages": [{"role": canary, "content": canary}]},
        {**SWIFT, "positive_messages": [[system(canary), *answer(canary)]]},
        f'{{"query": "{canary}"',
    ]
    with pytest.raises(DataError, match="8 faults") as caught:
        read_training_file(write(tmp_path, *rows))
    assert canary not in str(caught.value)


# Accounting.

texts = st.sampled_from(["a", "b", "c", " ", "", "é", "\ud800"]) | st.none() | st.integers()
lists_ = st.lists(texts, max_size=3) | texts
rows_ = st.one_of(
    st.fixed_dictionaries(
        {"query": texts, "positive": lists_, "negative": lists_},
        optional={"instruction": texts, "scores": lists_, "x": texts},
    ),
    st.fixed_dictionaries({"query": texts, "document": texts, "label": texts | st.booleans()}),
    st.fixed_dictionaries({"query": texts, "pos": lists_, "neg": lists_}),
    st.just(SWIFT),
    st.sampled_from([OURS, PAIR, FLAG]),
)
lines_ = st.one_of(
    rows_.map(lambda row: json.dumps(row).encode()),
    rows_.map(lambda row: json.dumps(row).encode()[:-3]),
    st.binary(max_size=8).map(lambda line: line.replace(b"\n", b"")),
    st.sampled_from([b"", b" ", b"\t\r", b"\xc2\xa0", b"\xef\xbb\xbf", b"[]", b"{}", b"null"]),
)


def attempt(path: str, *, skip_bad: bool) -> TrainingFile | str:
    try:
        return read_training_file(path, skip_bad=skip_bad)
    except DataError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(lines_, max_size=12))
def test_accepted_and_rejected_are_the_lines_that_are_not_blank(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    file = tmp_path_factory.getbasetemp() / "property.jsonl"
    file.write_bytes(b"\n".join(lines))
    filled = [
        i
        for i, line in enumerate(lines, 1)
        if line.decode("utf-8-sig" if i == 1 else "utf-8", "replace").strip()
    ]
    read = attempt(str(file), skip_bad=True)
    if isinstance(read, str):
        assert read.startswith(f"{file} has {len(filled)} fault" if filled else f"0 rows in {file}")
        return
    assert read.num_rows + len(read.rejected) == read.num_lines == len(filled)
    rejected = [int(each.removeprefix(f"{file}:").split(":")[0]) for each in read.rejected]
    assert set(rejected) <= set(filled)
    assert len(set(rejected)) == len(rejected)
    strict = attempt(str(file), skip_bad=False)
    if rejected:
        assert isinstance(strict, str)
        assert f"has {len(rejected)} fault" in strict
    else:
        assert strict == read
    for group in read.groups:
        assert group.query.strip()
        assert not set(group.positive) & set(group.negative)
        assert all(map(str.strip, group.positive + group.negative))

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen3_reranker
from finetune.cli import main
from finetune.data import (
    TrainingFile,
    TrainingGroup,
    check_leaks,
    describe,
    read_training_file,
)
from qwen3_reranker import DataError, InputError, MissingExtraError
from qwen3_reranker.candidates import CandidateList

ROOT = Path(__file__).parents[2]

OURS = {"query": "q", "positive": ["yes"], "negative": ["no", "never"]}
PAIR = {"query": "q", "document": "d", "label": "yes"}
SWIFT = {
    "messages": [{"role": "user", "content": "q"}],
    "positive_messages": [[{"role": "assistant", "content": "yes"}]],
    "negative_messages": [
        [{"role": "assistant", "content": "no"}],
        [{"role": "assistant", "content": "never"}],
    ],
}
FLAG = {"query": "q", "pos": ["yes"], "neg": ["no", "never"]}


def write(tmp_path: Path, *rows: Any, name: str = "train.jsonl") -> str:
    """Write rows as JSON lines; bytes and strings are lines as they are."""
    file = tmp_path / name
    lines = [
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    file.write_bytes(b"\n".join(lines))
    return str(file)


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def answer(content: Any, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


# What a file may hold.


def test_ours_takes_every_key(tmp_path: Path) -> None:
    scores = {"positive": [2], "negative": [-1.5, 0]}
    path = write(
        tmp_path, {**OURS, "instruction": "Find law"}, {**OURS, "query": "r", "scores": scores}
    )
    assert read_training_file(path).groups == [
        TrainingGroup("q", ["yes"], ["no", "never"], "Find law"),
        TrainingGroup("r", ["yes"], ["no", "never"], None, [2.0, -1.5, 0.0]),
    ]


SCORED = TrainingGroup("q", ["yes"], ["no", "never"], "Find law", [3.0, -1.0, 0.5])
UNSCORED = TrainingGroup("q", ["yes"], ["no", "never"], "Find law")
SAME_IN_EVERY_LAYOUT: list[tuple[list[dict[str, Any]], TrainingGroup]] = [
    ([{**OURS, "instruction": "Find law"}], UNSCORED),
    (
        [
            {"query": "q", "document": "yes", "label": "yes", "instruction": "Find law"},
            {"query": "q", "document": "no", "label": "no", "instruction": "Find law"},
            {"query": "q", "document": "never", "label": "no", "instruction": "Find law"},
        ],
        UNSCORED,
    ),
    ([{**SWIFT, "messages": [system("Find law"), *SWIFT["messages"]]}], UNSCORED),
    ([{**FLAG, "prompt": "Find law"}], UNSCORED),
    (
        [
            {
                **OURS,
                "instruction": "Find law",
                "scores": {"positive": [3.0], "negative": [-1.0, 0.5]},
            }
        ],
        SCORED,
    ),
    ([{**FLAG, "prompt": "Find law", "pos_scores": [3.0], "neg_scores": [-1.0, 0.5]}], SCORED),
]
LAYOUT_NAMES = ["ours", "pairs", "ms-swift", "FlagEmbedding", "ours scored", "FlagEmbedding scored"]


@pytest.mark.parametrize(("rows", "group"), SAME_IN_EVERY_LAYOUT, ids=LAYOUT_NAMES)
def test_every_layout_says_the_same(
    tmp_path: Path, rows: list[dict[str, Any]], group: TrainingGroup
) -> None:
    file = read_training_file(write(tmp_path, *rows))
    assert file.groups == [group]
    assert (file.num_lines, file.num_rows, file.rejected) == (len(rows), len(rows), [])


@pytest.mark.parametrize(("rows", "group"), SAME_IN_EVERY_LAYOUT, ids=LAYOUT_NAMES)
def test_every_layout_says_the_same_as_parquet(
    tmp_path: Path, rows: list[dict[str, Any]], group: TrainingGroup
) -> None:
    path = parquet(tmp_path, rows)
    file = read_training_file(path)
    assert file.groups == [group]
    assert file.num_lines == file.num_rows == len(rows)
    assert file.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("row", [OURS, PAIR, SWIFT, FLAG], ids=LAYOUT_NAMES[:4])
def test_rows_without_instruction_get_that_of_the_file(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path, row)
    (group,) = read_training_file(path, instruction="Find law").groups
    assert group.instruction == "Find law"
    (group,) = read_training_file(path).groups
    assert group.instruction is None


def test_own_instruction_wins_and_an_empty_one_is_literal(tmp_path: Path) -> None:
    rows = [{**OURS, "instruction": value} for value in ("Own", "", None)]
    groups = read_training_file(write(tmp_path, *rows), instruction="File").groups
    assert [group.instruction for group in groups] == ["Own", "", "File"]


def test_pairs_are_grouped_by_query_and_instruction_in_order_of_appearance(tmp_path: Path) -> None:
    rows = [
        {"query": "b", "document": "1", "label": 1},
        {"query": "a", "document": "2", "label": 0},
        {"query": "b", "document": "3", "label": 0},
        {"query": "b", "document": "1", "label": 0, "instruction": "Other"},
        {"query": "b", "document": "4", "label": 1, "instruction": "File"},
        {"query": "a", "document": "5", "label": 0},
    ]
    file = read_training_file(write(tmp_path, *rows), instruction="File")
    assert file.groups == [
        TrainingGroup("b", ["1", "4"], ["3"], "File"),
        TrainingGroup("a", [], ["2", "5"], "File"),
        TrainingGroup("b", [], ["1"], "Other"),
    ]
    assert file.num_rows == file.num_lines == 6


@pytest.mark.parametrize(
    ("label", "relevant_from", "is_relevant"),
    [
        ("yes", 1, True),
        ("no", 1, False),
        (True, 3, True),
        (False, 1, False),
        (0, 1, False),
        (1, 1, True),
        (1, 2, False),
        (2, 2, True),
        (7, 2, True),
        ("yes", 5, True),
    ],
)
def test_labels(tmp_path: Path, label: object, relevant_from: int, is_relevant: bool) -> None:
    path = write(tmp_path, {**PAIR, "label": label})
    (group,) = read_training_file(path, relevant_from=relevant_from).groups
    assert (group.positive, group.negative) == ((["d"], []) if is_relevant else ([], ["d"]))


def test_relevant_from_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="relevant_from must be at least 1, got 0"):
        read_training_file(write(tmp_path, PAIR), relevant_from=0)


def test_flag_embedding_keys_that_say_nothing_are_ignored(tmp_path: Path) -> None:
    row = {**FLAG, "id": 3, "type": "normal", "pos_id": [1], "neg_id": ["a"], "pos_scores": None}
    assert read_training_file(write(tmp_path, row)).groups == [
        TrainingGroup("q", ["yes"], ["no", "never"], None)
    ]


def test_system_message_of_a_document_may_repeat_the_rows(tmp_path: Path) -> None:
    positive = [[system("Find law"), *answer("yes", "user")]]
    row = {
        **SWIFT,
        "messages": [system("Find law"), *SWIFT["messages"]],
        "positive_messages": positive,
    }
    assert read_training_file(write(tmp_path, row)).groups == [UNSCORED]
    row = {**SWIFT, "positive_messages": positive}
    path = write(tmp_path, row)
    assert read_training_file(path, instruction="Find law").groups == [UNSCORED]


def test_a_query_may_have_rows_that_share_documents(tmp_path: Path) -> None:
    rows = [OURS, {**OURS, "positive": ["sure"]}, {**OURS, "instruction": "x", "positive": ["no"]}]
    rows[2]["negative"] = ["yes"]
    assert len(read_training_file(write(tmp_path, *rows)).groups) == 3


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.xz", lzma.compress)],
)
def test_files_are_read_by_ending_and_hashed_as_they_are(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    content = compress(b"\xef\xbb\xbf" + json.dumps(OURS).encode() + b"\r\n\r\n \n")
    file = tmp_path / name
    file.write_bytes(content)
    assert read_training_file(str(file)) == TrainingFile(
        path=str(file),
        sha256=hashlib.sha256(content).hexdigest(),
        num_lines=1,
        groups=[TrainingGroup("q", ["yes"], ["no", "never"], None)],
        rejected=[],
        num_rows=1,
    )


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


# Tables and hub names.


def parquet(tmp_path: Path, rows: list[dict[str, Any]], name: str = "train.parquet") -> str:
    import datasets

    datasets.disable_progress_bars()
    path = str(tmp_path / name)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def test_parquet_columns_that_are_null_are_absent(tmp_path: Path) -> None:
    rows = [
        {
            **OURS,
            "instruction": "Find law",
            "note": None,
            "scores": {"positive": [3.0], "negative": [-1.0, 0.5]},
        },
        {**OURS, "query": "r"},
        {**OURS, "query": None},
        {**OURS, "query": "s", "note": "of this row alone"},
    ]
    path = parquet(tmp_path, rows, "odd [name]*.parquet")
    file = read_training_file(path, skip_bad=True)
    assert file.groups == [SCORED, TrainingGroup("r", ["yes"], ["no", "never"], None)]
    assert file.rejected == [
        f"{path}:3: 'query' must be a string that is not blank, got nothing",
        f"{path}:4: unknown key 'note'; known are instruction, negative, positive, query, scores",
    ]
    assert file.num_rows + len(file.rejected) == file.num_lines == 4


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_parquet_scores_must_be_finite(tmp_path: Path, score: float) -> None:
    path = parquet(tmp_path, [{**FLAG, "pos_scores": [score], "neg_scores": [0.0, 1.0]}])
    with pytest.raises(DataError, match=rf"pos_scores\[0\] must be a finite number, got {score}"):
        read_training_file(path)


def test_parquet_labels_must_be_whole(tmp_path: Path) -> None:
    path = parquet(tmp_path, [{**PAIR, "label": float("nan")}, {**PAIR, "label": 1.0}])
    with pytest.raises(DataError, match=r"(?s)2 faults.*:1: 'label' .* got nan.*:2: .* got float"):
        read_training_file(path)


def test_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path, [OURS])
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match=r"^0 rows in"):
        read_training_file(path)


def test_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, OURS, name="train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet cannot be loaded: ArrowInvalid") as caught:
        read_training_file(path)
    assert caught.value.__cause__ is not None


def test_hub_name_is_loaded_with_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"  # what stands for a repository
    folder.mkdir()
    parquet(folder, [OURS], "train.parquet")
    parquet(folder, [{**OURS, "query": "r"}, {**OURS, "query": "s"}], "test.parquet")
    train = read_training_file(f"hf://{folder}")
    test = read_training_file(f"hf://{folder}:test", instruction="Find law")
    assert train.groups == [TrainingGroup("q", ["yes"], ["no", "never"], None)]
    assert [(group.query, group.instruction) for group in test.groups] == [
        ("r", "Find law"),
        ("s", "Find law"),
    ]
    row = json.dumps(OURS, sort_keys=True).encode() + b"\n"
    assert train.sha256 == hashlib.sha256(row).hexdigest() != test.sha256
    with pytest.raises(DataError, match="cannot be loaded: ValueError: Unknown split"):
        read_training_file(f"hf://{folder}:dev")


@pytest.mark.parametrize("path", ["train.parquet", "hf://name:train"])
def test_without_datasets_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    write(tmp_path, OURS, name="train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'Run: pip install "qwen3-reranker\[finetune\]"'):
        read_training_file(path)


def test_reading_json_lines_imports_no_framework(tmp_path: Path) -> None:
    path = write(tmp_path, OURS, LINE)
    code = (
        "import sys; from finetune.data import read_training_file, describe, check_leaks; "
        f"groups = read_training_file({path!r}).groups; "
        "describe(groups); check_leaks(groups, {}); "
        "heavy = {'datasets', 'trl', 'torch', 'transformers', 'pyarrow', 'peft', 'pandas'}; "
        "sys.exit(str(heavy & set(sys.modules) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""


# Leaks and descriptions.


def candidates(query_id: str, query: str, texts: list[str], labels: list[int] | None) -> Any:
    return CandidateList(
        query_id, query, None, list(map(str, range(len(texts)))), texts, labels, []
    )


TRAIN = [
    TrainingGroup("What is  law?", ["Law is X", "shared"], ["bad"], None),
    TrainingGroup("other", ["Text"], ["worse"], None),
]


def test_clean_evaluation_has_no_leaks() -> None:
    lists = [
        candidates(
            "1", "new", ["bad", "text", "Law is X"], [1, 1, 0]
        ),  # irrelevant ones may repeat
        candidates("2", "newer", ["Law is X"], None),
    ]
    assert check_leaks(TRAIN, {"dev": lists, "guard": []}) == []


def test_leaking_queries_are_found_apart_from_case_spacing_and_forms() -> None:
    lists = [
        candidates("a", "what IS law?", ["n"], [1]),
        candidates("b", "\uff37hat is\u00a0law?\n", ["n"], None),
        candidates("c", "what is lore?", ["n"], [1]),
    ]
    assert check_leaks(TRAIN, {"dev": lists}) == [
        "dev: 2 of 3 queries stand in training (query_id a, b)"
    ]


def test_leaking_documents_are_found_per_set_and_kind() -> None:
    lists = [
        candidates("a", "what is law?", ["law  is x", "shared", "Text", "bad"], [1, 2, 1, 1]),
        candidates("b", "new", ["shared", "law is x"], [3, 3]),
    ]
    assert check_leaks(TRAIN, {"dev": lists[:1], "guard": lists[1:]}) == [
        "dev: 1 of 1 queries stand in training (query_id a)",
        "dev: 2 relevant documents are training positives of the same query (query_id a)",
        "dev: 1 relevant documents are training positives of other queries (query_id a)",
        "guard: 1 relevant documents are training positives of other queries (query_id b)",
    ]


def test_leaks_name_three_queries_and_no_texts() -> None:
    train = [TrainingGroup(f"CANARY {i}", ["CANARY"], ["no"], None) for i in range(9)]
    lists = [candidates(f"id{i}", f"CANARY {i}", ["CANARY"], [1]) for i in range(9)]
    queries, documents = check_leaks(train, {"dev": lists})
    assert queries == "dev: 9 of 9 queries stand in training (query_id id0, id1, id2)"
    assert documents.startswith("dev: 9 relevant documents are")
    assert "CANARY" not in documents


def test_describe_counts() -> None:
    groups = [
        TrainingGroup("a", ["1"], ["2", "3"], "x"),
        TrainingGroup("A ", ["1", "4"], ["2", "3", "5", "6"], "x"),
        TrainingGroup("b", ["1", "2", "3"], ["4"], "y"),
        TrainingGroup("c", ["1"], ["2"], None),
    ]
    assert describe(groups) == [
        "3 queries in 4 groups, 1 of them in more than one",
        "7 positives; per group 1 min, 1.5 median, 3 max",
        "8 negatives; per group 1 min, 1.5 median, 4 max",
        "2 own instructions, in 3 groups",
    ]


def test_describe_names_groups_of_one_kind() -> None:
    groups = [
        TrainingGroup("a", ["1"], [], None),
        TrainingGroup("b", [], ["2"], None),
        TrainingGroup("c", [], ["2"], None),
    ]
    assert describe(groups)[4:] == ["2 groups without a positive", "1 groups without a negative"]


def test_describe_takes_no_groups() -> None:
    assert describe([]) == ["0 queries"]


# The command.


def test_validate_describes_what_it_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, OURS, {**OURS, "query": "r", "instruction": "Find law"})
    assert main(["validate", path]) == 0
    out, err = capsys.readouterr()
    assert "2 rows" in out
    assert "2 queries in 2 groups" in out
    assert not err


def test_validate_goes_on_after_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path, {**OURS, "query": ""}, OURS, {"query": "q"}, name="bad.jsonl")
    empty = write(tmp_path, name="empty.jsonl")
    good = write(tmp_path, OURS)
    assert main(["validate", bad, empty, str(tmp_path / "missing.jsonl"), good]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(good)
    assert f"{bad}:1: 'query' must be" in err
    assert f"{bad}:3: 'positive' must be" in err
    assert f"0 rows in {empty}" in err
    assert "missing.jsonl cannot be read" in err


@pytest.mark.parametrize("arguments", [[], ["validate"], ["unknown"]])
def test_usage_errors_exit_with_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: qwen3-finetune" in capsys.readouterr().err


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"qwen3-finetune {qwen3_reranker.__version__}\n"

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qwen3_reranker import TEMPLATES, InputError, ModelLoadError
from qwen3_reranker.text.steps import finish
from qwen3_reranker.text.tokenizer import EncodedGroup, PromptTokenizer, _common_length
from tests import official, real_parts, texts

QWEN3_JSON = real_parts.qwen3_tokenizer_file().read_text(encoding="utf-8")
FULL = Tokenizer.from_str(QWEN3_JSON)
TOKENIZER = PromptTokenizer(QWEN3_JSON)
LAST_ORDINARY_ID = 151642


def encode(query: str, documents: list[str], **settings: Any) -> EncodedGroup:
    instruction = settings.pop("instruction", official.INSTRUCTION)
    settings = {"max_length": 8192, **settings}
    return TOKENIZER.encode_group(instruction, query, documents, **settings)


def full_ids(text: str) -> list[int]:
    return list(FULL.encode(text, add_special_tokens=False).ids)


def body(group: EncodedGroup, document: int = 0) -> list[int]:
    """Return the ids between prefix and suffix."""
    ids = np.concatenate([group.head[39:], group.documents[document][:-9]])
    return [int(id) for id in ids]


def assert_official(instruction: str, query: str, document: str) -> None:
    group = encode(query, [document], instruction=instruction)
    assert body(group) == full_ids(official.format_body(instruction, query, document))


def assert_no_control_ids(group: EncodedGroup) -> None:
    for i in range(len(group.documents)):
        assert max(body(group, i)) <= LAST_ORDINARY_ID


def test_constants_are_the_model_cards() -> None:
    assert TOKENIZER.prefix.tolist() == full_ids(official.PREFIX)
    assert TOKENIZER.suffix.tolist() == full_ids(official.SUFFIX)
    assert (len(TOKENIZER.prefix), len(TOKENIZER.suffix)) == (39, 9)
    assert (TOKENIZER.yes_id, TOKENIZER.no_id) == (9693, 2152)


def test_rebuilt_tokenizer_equals_the_official_file(official_tokenizer_file: Path) -> None:
    assert json.loads(QWEN3_JSON) == json.loads(official_tokenizer_file.read_text("utf-8"))


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_random_unicode_equals_the_official_recipe(count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        assert_official(*(texts.random_text(rng) for _ in range(3)))


@pytest.mark.parametrize("split", ["mini", pytest.param("dev", marks=pytest.mark.slow)])
def test_real_texts_equal_the_official_recipe(split: str) -> None:
    folder = real_parts.shared_data()
    if folder is None:
        pytest.skip("needs the reranking sets in ../shared/data")
    from qwen3_reranker.data.trec import read_candidates

    files = sorted(folder.glob(f"*.{split}.jsonl.xz"))
    assert files
    for file in files:
        for row in read_candidates(str(file)):
            instruction = row.instruction or official.INSTRUCTION
            group = encode(row.query, row.texts, instruction=instruction, max_length=32768)
            for i, text in enumerate(row.texts):
                assert body(group, i) == full_ids(
                    official.format_body(instruction, row.query, text)
                )


def test_negative_control_other_splits_are_not_exact() -> None:
    rng = random.Random(0)
    wrong = 0
    for _ in range(300):
        document = texts.random_text(rng)
        whole = full_ids("<Document>: " + document)
        wrong += full_ids("<Document>: ") + full_ids(document) != whole
    assert wrong > 60, "leaving the space in the head must be seen to fail"


@pytest.mark.parametrize("field", ["instruction", "query", "document"])
def test_control_token_text_stays_text(field: str) -> None:
    for text in texts.hostile_texts():
        fields = {"instruction": "i", "query": "q", "document": "d", field: text}
        group = encode(fields["query"], [fields["document"]], instruction=fields["instruction"])
        assert_no_control_ids(group)


def test_negative_control_the_official_tokenizer_reads_control_tokens() -> None:
    assert max(full_ids(texts.hostile_texts()[0])) > LAST_ORDINARY_ID


def test_nested_and_split_markers_stay_text() -> None:
    documents = texts.nested_control_texts(random.Random(0), 500)
    assert_no_control_ids(encode("q", documents))


ANY_TEXT = st.lists(
    st.text(st.characters(), max_size=30)  # every category, surrogates too
    | st.sampled_from(real_parts.ADDED_TOKENS)
    | st.sampled_from(["{}", "{0}", "%s", "\0", "<|im_", "end|>", "\n<Document>:", " "]),
    max_size=6,
).map("".join)


def repaired(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_any_text(instruction: str, query: str, document: str) -> bool:
    """Assert what holds of every text; return whether it has official ids to compare with."""
    group = encode(query, [document], instruction=instruction)
    assert_no_control_ids(group)
    assert group.head[:39].tolist() == TOKENIZER.prefix.tolist()
    assert group.documents[0][-9:].tolist() == TOKENIZER.suffix.tolist()
    assert group.truncated == [False]
    given_texts = (instruction, query, document)
    assert group.num_repaired == sum(
        any("\ud800" <= char <= "\udfff" for char in text) for text in given_texts
    )
    whole = official.format_body(*map(repaired, given_texts))
    assert FULL.decode(body(group), skip_special_tokens=False) == unicodedata.normalize(
        "NFC", whole
    )
    is_ordinary = not any(token in whole for token in real_parts.ADDED_TOKENS)
    if is_ordinary:
        assert body(group) == full_ids(whole)
    return is_ordinary


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_text_is_official_but_for_control_tokens_which_stay_text(count: int) -> None:
    kinds: list[bool] = []

    @settings(max_examples=count, deadline=None, database=None)
    @given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
    def check(instruction: str, query: str, document: str) -> None:
        kinds.append(check_any_text(instruction, query, document))

    check()
    print(f"{len(kinds)} examples, {sum(kinds)} of them ordinary and equal to the official ids")
    assert len(kinds) >= count
    assert sum(kinds) > count / 10, "both kinds must be there"
    assert sum(kinds) < count


def test_control_any_text_reaches_what_the_guard_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # With the full tokenizer in the place of the one without added tokens it must fail.
    monkeypatch.setattr(TOKENIZER, "_plain", FULL)

    @settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])
    @given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
    def check(instruction: str, query: str, document: str) -> None:
        assert_no_control_ids(encode(query, [document], instruction=instruction))

    with pytest.raises(AssertionError):
        check()


def test_empty_and_blank_documents_are_encoded_as_they_are() -> None:
    group = encode("q", ["", " ", "\n"])
    for i, document in enumerate(["", " ", "\n"]):
        assert body(group, i) == full_ids(official.format_body(official.INSTRUCTION, "q", document))
    assert group.truncated == [False] * 3


@pytest.mark.parametrize(("room", "is_cut"), [(1, True), (5, True), (300, False)])
def test_truncation_cuts_only_the_documents_end(room: int, is_cut: bool) -> None:
    whole = encode("q", ["one two three " * 20])
    max_length = len(whole.head) + 9 + room
    group = encode("q", ["one two three " * 20], max_length=max_length)
    assert group.head.tolist() == whole.head.tolist()
    assert group.documents[0][-9:].tolist() == TOKENIZER.suffix.tolist()
    assert group.documents[0][:-9].tolist() == whole.documents[0][:-9][:room].tolist()
    assert group.truncated == [is_cut]
    assert len(group.head) + len(group.documents[0]) <= max_length


@pytest.mark.parametrize("max_length", [1, 48, 70])
def test_query_that_leaves_no_room_is_refused_with_both_numbers(max_length: int) -> None:
    with pytest.raises(InputError, match=rf"take 7\d tokens .* max_length is {max_length}"):
        encode("q", ["d"], max_length=max_length)


@pytest.mark.parametrize("length", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(texts.long_families(16)))
def test_long_text_encoded_from_its_beginning_equals_the_whole(name: str, length: int) -> None:
    text = texts.long_families(length)[name]
    head = len(encode("q", [""]).head)
    # Control tokens' text has no official ids; there the growing parts must equal one whole.
    whole = full_ids(" " + text)
    if name == "controls":
        whole = encode("q", [text], max_length=10**9).documents[0][:-9].tolist()
    for room in (1, 50, 500):
        group = encode("q", [text], max_length=head + 9 + room)
        ids = group.documents[0][:-9].tolist()
        assert ids == whole[:room]
        assert group.truncated == [len(whole) > room]


def test_unsorted_marks_are_never_cut_apart() -> None:
    # NFC sorts a whole run of combining marks: a cut inside would change even its first ids.
    text = "x" * 1000 + "\u0301\u0323" * 3000
    head = len(encode("q", [""]).head)
    group = encode("q", [text], max_length=head + 9 + 600)
    assert group.documents[0][:-9].tolist() == full_ids(" " + text)[:600]


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("\ud83d", "\ufffd"),
        ("\ude00", "\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("a\udcffb", "a\ufffdb"),
        ("\ud83d\ud83d\ude00", "\ufffd😀"),
    ],
)
@pytest.mark.parametrize("position", [0, 3, 7])
def test_lone_surrogates_are_repaired_and_counted(
    broken: str, repaired: str, position: int
) -> None:
    documents = [f"document {i}" for i in range(8)]
    expected = encode("q", [*documents[:position], repaired, *documents[position + 1 :]])
    documents[position] = broken
    group = encode("q", documents)
    assert group.num_repaired == 1
    for mine, theirs in zip(group.documents, expected.documents, strict=True):
        assert mine.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "text", ["", "one two", " two  spaces", "naïve 北京 👩\u200d🔬", "a\ud83db"]
)
def test_token_spans_are_places_in_the_document(text: str) -> None:
    spans = TOKENIZER.token_spans(text)
    assert len(spans) == len(full_ids(" " + repaired(text)))
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert spans[len(spans) - 1] == spans[-1]
    starts = [start for start, _ in spans]
    assert starts == sorted(starts)
    if repaired(text) == text:
        offsets = FULL.encode(" " + text, add_special_tokens=False).offsets
        assert list(spans) == [(max(a - 1, 0), max(b - 1, 0)) for a, b in offsets]
    assert all(0 <= start <= stop <= len(text) for start, stop in spans)


def test_token_spans_cut_words() -> None:
    text = "one two three"
    assert [text[a:b] for a, b in TOKENIZER.token_spans(text)] == ["one", " two", " three"]


def test_threads_share_the_tokenizer_without_races() -> None:
    rng = random.Random(1)
    jobs = [
        ([texts.random_text(rng) for _ in range(5)], rng.randrange(90, 200)) for _ in range(200)
    ]

    def run(job: tuple[list[str], int]) -> list[list[int]]:
        return [ids.tolist() for ids in encode("q", job[0], max_length=job[1]).documents]

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, jobs)) == alone


FEW = 10_000
"""Tokens of a tokenizer that is quickly built; "yes" and "no" are among them."""


@cache
def small_tokenizer() -> str:
    """Return Qwen3's tokenizer without its rarer tokens."""
    state = json.loads(QWEN3_JSON)
    vocabulary = {token: id for token, id in state["model"]["vocab"].items() if id < FEW}
    state["model"]["vocab"] = vocabulary
    state["model"]["merges"] = [m for m in state["model"]["merges"] if "".join(m) in vocabulary]
    for i, token in enumerate(state["added_tokens"]):
        token["id"] = FEW + i
    return json.dumps(state)


def changed_tokenizer(change: Callable[[dict[str, Any]], None]) -> str:
    state = json.loads(small_tokenizer())
    change(state)
    return json.dumps(state)


def test_control_the_small_tokenizer_itself_is_accepted() -> None:
    small = PromptTokenizer(small_tokenizer())
    assert small.template is TEMPLATES["qwen3-reranker"]
    assert (small.yes_id, small.no_id) == (9693, 2152)


def without(*contents: str) -> str:
    def change(state: dict[str, Any]) -> None:
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in contents]

    return changed_tokenizer(change)


def test_settings_of_the_file_that_add_cut_or_pad_are_left_out() -> None:
    def change(state: dict[str, Any]) -> None:
        first = state["added_tokens"][0]
        special = {"SpecialToken": {"id": first["content"], "type_id": 0}}
        state["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [special, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                first["content"]: {
                    "id": first["content"], "ids": [first["id"]], "tokens": [first["content"]]
                }
            },
        }  # fmt: skip
        state["truncation"] = {
            "direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0
        }  # fmt: skip
        state["padding"] = {
            "strategy": {"Fixed": 3000}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": first["id"], "pad_type_id": 0, "pad_token": first["content"],
        }  # fmt: skip

    plain, other = PromptTokenizer(small_tokenizer()), PromptTokenizer(changed_tokenizer(change))
    assert other.prefix.tolist() == plain.prefix.tolist()
    assert other.suffix.tolist() == plain.suffix.tolist()
    texts_of = ("Find", "a query", ["word " * 30, ""])
    mine, theirs = (t.encode_group(*texts_of, max_length=2000) for t in (other, plain))
    assert mine.head.tolist() == theirs.head.tolist()
    assert [d.tolist() for d in mine.documents] == [d.tolist() for d in theirs.documents]


def test_shared_beginning_is_what_queries_of_an_instruction_have_in_common() -> None:
    for instruction in (None, "Find", "", "trailing space ", "\ud83d"):
        groups = [
            TOKENIZER.encode_group(instruction, query, [], max_length=512)
            for query in ("apple tree", "zebra", "\n\n", "1", " ")
        ]
        first, second = (group.head.tolist() for group in groups[:2])
        shared = groups[0].num_shared
        assert first[:shared] == second[:shared]
        assert first[shared] != second[shared]
        for group in groups:
            assert group.head[: group.num_shared].tolist() == first[: group.num_shared]
        ordinary = instruction if instruction != "\ud83d" else "\ufffd"
        ordinary = TOKENIZER.template.default_instruction if ordinary is None else ordinary
        assert shared == 39 + len(full_ids(TOKENIZER.template.beginning(ordinary)))


def test_common_length_ends_at_the_first_difference() -> None:
    def common(a: list[int], b: list[int]) -> int:
        return _common_length(np.array(a, np.int32), np.array(b, np.int32))

    assert common([1, 2, 3, 4], [1, 9, 3, 8]) == 1
    assert common([1, 2, 3], [1, 2, 3, 4]) == 3
    assert common([7], [8]) == common([], [1]) == 0


def test_tokenizer_without_think_gets_chatml() -> None:
    assert PromptTokenizer(without("<think>")).template is TEMPLATES["chatml"]


def test_tokenizer_without_chat_tokens_asks_for_a_template() -> None:
    with pytest.raises(ModelLoadError, match="Pass template="):
        PromptTokenizer(without("<|im_start|>"))


def test_template_that_the_tokenizer_cannot_express_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="'qwen3-reranker' needs <think> as single tokens"):
        PromptTokenizer(without("<think>"), TEMPLATES["qwen3-reranker"])


def test_answer_of_several_tokens_is_refused() -> None:
    def change(state: dict[str, Any]) -> None:
        state["model"]["merges"].remove(["y", "es"])

    with pytest.raises(ModelLoadError, match="yes and no are not single tokens"):
        PromptTokenizer(changed_tokenizer(change))


def test_tokenizer_that_merges_across_the_boundary_is_refused() -> None:
    def change(state: dict[str, Any]) -> None:
        state["pre_tokenizer"] = state["pre_tokenizer"]["pretokenizers"][1]  # no splitting at all
        state["model"]["vocab"]["ĠĠplain"] = FEW - 1
        state["model"]["merges"] = [[":", "Ġ"], *state["model"]["merges"]]
        state["model"]["vocab"][":Ġ"] = state["model"]["vocab"].pop("ĠĠplain")

    with pytest.raises(ModelLoadError, match="merges text across"):
        PromptTokenizer(changed_tokenizer(change))


def test_tokenizer_whose_text_spells_a_control_token_is_refused() -> None:
    def change(state: dict[str, Any]) -> None:
        state["model"]["vocab"]["<think>"] = FEW + 24
        state["model"]["ignore_merges"] = True  # whole words are looked up before merging
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"<think>|\s|\w+|\W"}

    with pytest.raises(ModelLoadError, match="'<think>' as a control token"):
        PromptTokenizer(changed_tokenizer(change), TEMPLATES["chatml"])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer_file_is_refused(content: str) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be parsed"):
        PromptTokenizer(content)


@pytest.mark.parametrize("text", ["word " * 3000, " " * 50_000, "e" + "\u0301" * 5000])
def test_cut_text_ends_with_its_last_token(text: str) -> None:
    cut = finish(TOKENIZER.cut_steps(text, 5))
    assert text.startswith(cut)
    assert len(TOKENIZER.token_spans(cut)) == 5


def test_text_of_few_tokens_is_not_cut() -> None:
    for text in ("", "one two", "a \ud83d half"):
        assert finish(TOKENIZER.cut_steps(text, 10)) is text


def test_query_that_is_far_too_long_is_not_counted_to_its_end() -> None:
    with pytest.raises(InputError, match=r"take more than \d+ tokens"):
        encode("1" * 100_000, ["d"], max_length=512)


def test_marks_that_nothing_stands_before_or_behind_are_read() -> None:
    run = "\u0301" * 200_000  # more than one window, to the end of the text
    whole = full_ids(" " + run[:100_000])
    group = encode("q", [run], max_length=512)
    ids = group.documents[0][:-9].tolist()
    assert ids == whole[: len(ids)]
    assert group.truncated == [True]

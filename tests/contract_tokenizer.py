"""What holds of `PromptTokenizer` over any vocabulary: a suite for the small one and for Qwen3's.

A test module subclasses it and has a fixture that returns the tokenizer:

    @pytest.fixture(scope="module")
    def subject() -> Subject:
        return Subject(qwen3_tokenizer_file().read_text(encoding="utf-8"))

    class TestQwen3(TokenizerContract):
        pass
"""

from __future__ import annotations

import json
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qwen3_reranker import InputError
from qwen3_reranker.text.steps import finish
from qwen3_reranker.text.tokenizer import EncodedGroup, PromptTokenizer
from tests import official, real_parts, texts

ANY_TEXT = st.lists(
    st.text(st.characters(), max_size=30)  # every category, surrogates too
    | st.sampled_from(real_parts.ADDED_TOKENS)
    | st.sampled_from(["{}", "{0}", "%s", "\0", "<|im_", "end|>", "\n<Document>:", " "]),
    max_size=6,
).map("".join)


class Subject:
    """One `tokenizer.json` as the official script reads it (`full`) and as we do (`tokenizer`)."""

    def __init__(self, tokenizer_json: str) -> None:
        self.full = Tokenizer.from_str(tokenizer_json)
        self.tokenizer = PromptTokenizer(tokenizer_json)
        self.last_ordinary_id = len(json.loads(tokenizer_json)["model"]["vocab"]) - 1

    def encode(self, query: str, documents: list[str], **settings: Any) -> EncodedGroup:
        instruction = settings.pop("instruction", official.INSTRUCTION)
        settings = {"max_length": 8192, **settings}
        return self.tokenizer.encode_group(instruction, query, documents, **settings)

    def full_ids(self, text: str) -> list[int]:
        return list(self.full.encode(text, add_special_tokens=False).ids)

    def body(self, group: EncodedGroup, document: int = 0) -> list[int]:
        """Return the ids between prefix and suffix."""
        prefix, suffix = len(self.tokenizer.prefix), len(self.tokenizer.suffix)
        ids = np.concatenate([group.head[prefix:], group.documents[document][:-suffix]])
        return [int(id) for id in ids]

    def text_ids(self, group: EncodedGroup, document: int = 0) -> list[int]:
        """Return the ids of a document without the suffix."""
        return group.documents[document][: -len(self.tokenizer.suffix)].tolist()

    def assert_official(self, instruction: str, query: str, document: str) -> None:
        group = self.encode(query, [document], instruction=instruction)
        assert self.body(group) == self.full_ids(official.format_body(instruction, query, document))

    def assert_official_at_random(self, count: int) -> None:
        rng = random.Random(count)
        for _ in range(count):
            self.assert_official(*(texts.random_text(rng) for _ in range(3)))

    def assert_no_control_ids(self, group: EncodedGroup) -> None:
        for i in range(len(group.documents)):
            assert max(self.body(group, i)) <= self.last_ordinary_id

    def check_any_text(self, instruction: str, query: str, document: str) -> bool:
        """Assert what holds of every text; return whether it has official ids to compare with."""
        tokenizer = self.tokenizer
        group = self.encode(query, [document], instruction=instruction)
        self.assert_no_control_ids(group)
        assert group.head[: len(tokenizer.prefix)].tolist() == tokenizer.prefix.tolist()
        assert group.documents[0][-len(tokenizer.suffix) :].tolist() == tokenizer.suffix.tolist()
        assert group.truncated == [False]
        given_texts = (instruction, query, document)
        assert group.num_repaired == sum(
            any("\ud800" <= char <= "\udfff" for char in text) for text in given_texts
        )
        whole = official.format_body(*map(repaired, given_texts))
        assert self.full.decode(
            self.body(group), skip_special_tokens=False
        ) == unicodedata.normalize("NFC", whole)
        is_ordinary = not any(token in whole for token in real_parts.ADDED_TOKENS)
        if is_ordinary:
            assert self.body(group) == self.full_ids(whole)
        return is_ordinary

    def check_any_texts(self, count: int) -> None:
        """Check drawn texts, of which some have official ids and some do not."""
        kinds: list[bool] = []

        @settings(max_examples=count, deadline=None, database=None)
        @given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
        def check(instruction: str, query: str, document: str) -> None:
            kinds.append(self.check_any_text(instruction, query, document))

        check()
        print(f"{len(kinds)} examples, {sum(kinds)} of them ordinary and equal to the official ids")
        assert len(kinds) >= count
        assert sum(kinds) > count / 10, "both kinds must be there"
        assert sum(kinds) < count

    def check_long_text(self, name: str, length: int) -> None:
        """Assert that a long text read from its beginning gets the ids of the whole."""
        text = texts.long_families(length)[name]
        tokenizer = self.tokenizer
        fixed = len(self.encode("q", [""]).head) + len(tokenizer.suffix)
        # Control tokens' text has no official ids; there the growing parts must equal one whole.
        whole = self.full_ids(" " + text)
        if name == "controls":
            whole = self.text_ids(self.encode("q", [text], max_length=10**9))
        for room in (1, 50, 500):
            group = self.encode("q", [text], max_length=fixed + room)
            assert self.text_ids(group) == whole[:room]
            assert group.truncated == [len(whole) > room]


def repaired(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TokenizerContract:
    """What a subclass's fixture `subject` must satisfy."""

    def test_constants_are_the_model_cards(self, subject: Subject) -> None:
        tokenizer = subject.tokenizer
        assert tokenizer.prefix.tolist() == subject.full_ids(official.PREFIX)
        assert tokenizer.suffix.tolist() == subject.full_ids(official.SUFFIX)
        assert [tokenizer.yes_id] == subject.full_ids("yes")
        assert [tokenizer.no_id] == subject.full_ids("no")

    def test_random_unicode_equals_the_official_recipe(self, subject: Subject) -> None:
        subject.assert_official_at_random(2_000)

    @pytest.mark.parametrize("field", ["instruction", "query", "document"])
    def test_control_token_text_stays_text(self, subject: Subject, field: str) -> None:
        for text in texts.hostile_texts():
            fields = {"instruction": "i", "query": "q", "document": "d", field: text}
            subject.assert_no_control_ids(
                subject.encode(
                    fields["query"], [fields["document"]], instruction=fields["instruction"]
                )
            )

    def test_negative_control_the_official_tokenizer_reads_control_tokens(
        self, subject: Subject
    ) -> None:
        assert max(subject.full_ids(texts.hostile_texts()[0])) > subject.last_ordinary_id

    def test_nested_and_split_markers_stay_text(self, subject: Subject) -> None:
        documents = texts.nested_control_texts(random.Random(0), 500)
        subject.assert_no_control_ids(subject.encode("q", documents))

    def test_any_text_is_official_but_for_control_tokens_which_stay_text(
        self, subject: Subject
    ) -> None:
        subject.check_any_texts(300)

    def test_control_any_text_reaches_what_the_guard_is_for(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # With the full tokenizer in the place of the one without added tokens it must fail.
        monkeypatch.setattr(subject.tokenizer, "_plain", subject.full)

        @settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])
        @given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
        def check(instruction: str, query: str, document: str) -> None:
            subject.assert_no_control_ids(
                subject.encode(query, [document], instruction=instruction)
            )

        with pytest.raises(AssertionError):
            check()

    def test_empty_and_blank_documents_are_encoded_as_they_are(self, subject: Subject) -> None:
        group = subject.encode("q", ["", " ", "\n"])
        for i, document in enumerate(["", " ", "\n"]):
            whole = official.format_body(official.INSTRUCTION, "q", document)
            assert subject.body(group, i) == subject.full_ids(whole)
        assert group.truncated == [False] * 3

    @pytest.mark.parametrize(("room", "is_cut"), [(1, True), (5, True), (300, False)])
    def test_truncation_cuts_only_the_documents_end(
        self, subject: Subject, room: int, is_cut: bool
    ) -> None:
        suffix = subject.tokenizer.suffix.tolist()
        whole = subject.encode("q", ["one two three " * 20])
        max_length = len(whole.head) + len(suffix) + room
        group = subject.encode("q", ["one two three " * 20], max_length=max_length)
        assert group.head.tolist() == whole.head.tolist()
        assert group.documents[0][-len(suffix) :].tolist() == suffix
        assert subject.text_ids(group) == subject.text_ids(whole)[:room]
        assert group.truncated == [is_cut]
        assert len(group.head) + len(group.documents[0]) <= max_length

    @pytest.mark.parametrize("max_length", [1, 48, 70])
    def test_query_that_leaves_no_room_is_refused_with_both_numbers(
        self, subject: Subject, max_length: int
    ) -> None:
        group = subject.encode("q", [""])
        least = len(group.head) + len(subject.tokenizer.suffix)
        assert max_length <= least
        told = rf"take {least} tokens .* max_length is {max_length}"
        with pytest.raises(InputError, match=told):
            subject.encode("q", ["d"], max_length=max_length)

    @pytest.mark.parametrize("name", list(texts.long_families(16)))
    def test_long_text_encoded_from_its_beginning_equals_the_whole(
        self, subject: Subject, name: str
    ) -> None:
        subject.check_long_text(name, 30_000)

    @pytest.mark.parametrize("marks", ["\u0301\u0323" * 3000, "\u0301" * 6000 + "\u0323"])
    def test_unsorted_marks_are_never_cut_apart(self, subject: Subject, marks: str) -> None:
        # NFC sorts a whole run of combining marks: the second run's last mark becomes its first.
        text = "x" * 10 + marks
        fixed = len(subject.encode("q", [""]).head) + len(subject.tokenizer.suffix)
        group = subject.encode("q", [text], max_length=fixed + 600)
        assert subject.text_ids(group) == subject.full_ids(" " + text)[:600]

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
        self, subject: Subject, broken: str, repaired: str, position: int
    ) -> None:
        documents = [f"document {i}" for i in range(8)]
        expected = subject.encode(
            "q", [*documents[:position], repaired, *documents[position + 1 :]]
        )
        documents[position] = broken
        group = subject.encode("q", documents)
        assert group.num_repaired == 1
        for mine, theirs in zip(group.documents, expected.documents, strict=True):
            assert mine.tolist() == theirs.tolist()

    @pytest.mark.parametrize(
        "text", ["", "one two", " two  spaces", "naïve 北京 👩\u200d🔬", "a\ud83db"]
    )
    def test_token_spans_are_places_in_the_document(self, subject: Subject, text: str) -> None:
        spans = subject.tokenizer.token_spans(text)
        assert len(spans) == len(subject.full_ids(" " + repaired(text)))
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
        assert spans[len(spans) - 1] == spans[-1]
        starts = [start for start, _ in spans]
        assert starts == sorted(starts)
        if repaired(text) == text:
            offsets = subject.full.encode(" " + text, add_special_tokens=False).offsets
            assert list(spans) == [(max(a - 1, 0), max(b - 1, 0)) for a, b in offsets]
        assert all(0 <= start <= stop <= len(text) for start, stop in spans)

    def test_token_spans_cut_words(self, subject: Subject) -> None:
        text = "one two three"
        spans = subject.tokenizer.token_spans(text)
        assert [text[a:b] for a, b in spans] == ["one", " two", " three"]

    def test_threads_share_the_tokenizer_without_races(self, subject: Subject) -> None:
        rng = random.Random(1)
        jobs = [
            ([texts.random_text(rng) for _ in range(5)], rng.randrange(90, 200)) for _ in range(200)
        ]

        def run(job: tuple[list[str], int]) -> list[list[int]]:
            group = subject.encode("q", job[0], max_length=job[1])
            return [ids.tolist() for ids in group.documents]

        alone = [run(job) for job in jobs]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(run, jobs)) == alone

    def test_shared_beginning_is_what_queries_of_an_instruction_have_in_common(
        self, subject: Subject
    ) -> None:
        tokenizer = subject.tokenizer
        for instruction in (None, "Find", "", "trailing space ", "\ud83d"):
            groups = [
                tokenizer.encode_group(instruction, query, [], max_length=512)
                for query in ("apple tree", "zebra", "\n\n", "1", " ")
            ]
            first, second = (group.head.tolist() for group in groups[:2])
            shared = groups[0].num_shared
            assert first[:shared] == second[:shared]
            assert first[shared] != second[shared]
            for group in groups:
                assert group.head[: group.num_shared].tolist() == first[: group.num_shared]
            ordinary = instruction if instruction != "\ud83d" else "\ufffd"
            ordinary = tokenizer.template.default_instruction if ordinary is None else ordinary
            beginning = subject.full_ids(tokenizer.template.beginning(ordinary))
            assert shared == len(tokenizer.prefix) + len(beginning)

    @pytest.mark.parametrize("text", ["word " * 3000, " " * 50_000, "e" + "\u0301" * 5000])
    def test_cut_text_ends_with_its_last_token(self, subject: Subject, text: str) -> None:
        cut = finish(subject.tokenizer.cut_steps(text, 5))
        assert text.startswith(cut)
        assert len(subject.tokenizer.token_spans(cut)) == 5

    def test_text_of_few_tokens_is_not_cut(self, subject: Subject) -> None:
        for text in ("", "one two", "a \ud83d half"):
            assert finish(subject.tokenizer.cut_steps(text, 10)) is text

    def test_query_that_is_far_too_long_is_not_counted_to_its_end(self, subject: Subject) -> None:
        with pytest.raises(InputError, match=r"take more than \d+ tokens"):
            subject.encode("1" * 100_000, ["d"], max_length=512)

    def test_marks_that_nothing_stands_before_or_behind_are_read(self, subject: Subject) -> None:
        run = "\u0301" * 200_000  # more than one window, to the end of the text
        whole = subject.full_ids(" " + run[:100_000])
        group = subject.encode("q", [run], max_length=512)
        ids = subject.text_ids(group)
        assert ids == whole[: len(ids)]
        assert group.truncated == [True]

"""Qwen3's own vocabulary: its ids, real texts and more drawn ones than the unit tests have."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests import official, real_parts, texts
from tests.contract_tokenizer import Subject, TokenizerContract


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(real_parts.qwen3_tokenizer_file().read_text(encoding="utf-8"))


class TestQwen3(TokenizerContract):
    pass


def test_prompt_and_answers_have_qwen3s_ids(subject: Subject) -> None:
    tokenizer = subject.tokenizer
    assert (len(tokenizer.prefix), len(tokenizer.suffix)) == (39, 9)
    assert (tokenizer.yes_id, tokenizer.no_id) == (9693, 2152)
    assert subject.last_ordinary_id == 151642


def test_rebuilt_tokenizer_equals_the_official_file(official_tokenizer_file: Path) -> None:
    rebuilt = real_parts.qwen3_tokenizer_file().read_text(encoding="utf-8")
    assert json.loads(rebuilt) == json.loads(official_tokenizer_file.read_text("utf-8"))


@pytest.mark.parametrize("split", ["mini", pytest.param("dev", marks=pytest.mark.slow)])
def test_real_texts_equal_the_official_recipe(subject: Subject, split: str) -> None:
    folder = real_parts.shared_data()
    if folder is None:
        pytest.skip("needs the reranking sets in ../shared/data")
    from qwen3_reranker.data.trec import read_candidates

    files = sorted(folder.glob(f"*.{split}.jsonl.xz"))
    assert files
    for file in files:
        for row in read_candidates(str(file)):
            instruction = row.instruction or official.INSTRUCTION
            group = subject.encode(row.query, row.texts, instruction=instruction, max_length=32768)
            for i, text in enumerate(row.texts):
                assert subject.body(group, i) == subject.full_ids(
                    official.format_body(instruction, row.query, text)
                )


def test_negative_control_other_splits_are_not_exact(subject: Subject) -> None:
    rng = random.Random(0)
    wrong = 0
    for _ in range(300):
        document = texts.random_text(rng)
        whole = subject.full_ids("<Document>: " + document)
        wrong += subject.full_ids("<Document>: ") + subject.full_ids(document) != whole
    assert wrong > 60, "leaving the space in the head must be seen to fail"


@pytest.mark.slow
def test_more_random_unicode_equals_the_official_recipe(subject: Subject) -> None:
    subject.assert_official_at_random(20_000)


@pytest.mark.slow
def test_many_texts_are_official_but_for_control_tokens_which_stay_text(subject: Subject) -> None:
    subject.check_any_texts(10_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(texts.long_families(16)))
def test_million_characters_encoded_from_their_beginning_equal_the_whole(
    subject: Subject, name: str
) -> None:
    subject.check_long_text(name, 1_000_000)

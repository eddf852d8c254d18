from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwen3_reranker import TEMPLATES, ModelLoadError
from qwen3_reranker.text.tokenizer import PromptTokenizer, _common_length
from tests.contract_tokenizer import Subject, TokenizerContract
from tests.small_tokenizer import small_tokenizer_json


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(small_tokenizer_json())


class TestSmallTokenizer(TokenizerContract):
    pass


def test_control_documents_encoded_without_their_space_are_not_exact(subject: Subject) -> None:
    for document in ("yes", "red apple", "one two three"):
        whole = subject.full_ids("<Document>: " + document)
        assert subject.full_ids("<Document>: ") + subject.full_ids(document) != whole


def test_small_tokenizer_spells_its_prompt_in_few_tokens(subject: Subject) -> None:
    # Tests that count tokens rely on it: a word of a prompt, or of a fruit, is one token.
    assert (len(subject.tokenizer.prefix), len(subject.tokenizer.suffix)) == (38, 9)
    assert len(subject.full_ids("red apple")) == 2


def changed_tokenizer(change: Callable[[dict[str, Any]], None]) -> str:
    state = json.loads(small_tokenizer_json())
    change(state)
    return json.dumps(state)


def test_control_the_small_tokenizer_itself_is_accepted() -> None:
    assert PromptTokenizer(small_tokenizer_json()).template is TEMPLATES["qwen3-reranker"]


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

    plain = PromptTokenizer(small_tokenizer_json())
    other = PromptTokenizer(changed_tokenizer(change))
    assert other.prefix.tolist() == plain.prefix.tolist()
    assert other.suffix.tolist() == plain.suffix.tolist()
    texts_of = ("Find", "a query", ["word " * 30, ""])
    mine, theirs = (t.encode_group(*texts_of, max_length=2000) for t in (other, plain))
    assert mine.head.tolist() == theirs.head.tolist()
    assert [d.tolist() for d in mine.documents] == [d.tolist() for d in theirs.documents]


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
        state["model"]["merges"] = [m for m in state["model"]["merges"] if "".join(m) != "yes"]

    with pytest.raises(ModelLoadError, match="yes and no are not single tokens"):
        PromptTokenizer(changed_tokenizer(change))


def test_tokenizer_that_merges_across_the_boundary_is_refused() -> None:
    def change(state: dict[str, Any]) -> None:
        state["pre_tokenizer"] = state["pre_tokenizer"]["pretokenizers"][1]  # no splitting at all
        state["model"]["merges"] = [[":", "Ġ"], *state["model"]["merges"]]
        state["model"]["vocab"][":Ġ"] = state["added_tokens"][-1]["id"] + 1

    with pytest.raises(ModelLoadError, match="merges text across"):
        PromptTokenizer(changed_tokenizer(change))


def test_tokenizer_whose_text_spells_a_control_token_is_refused() -> None:
    def change(state: dict[str, Any]) -> None:
        (think,) = (t["id"] for t in state["added_tokens"] if t["content"] == "<think>")
        state["model"]["vocab"]["<think>"] = think
        state["model"]["ignore_merges"] = True  # whole words are looked up before merging
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"<think>|\s|\w+|\W"}

    with pytest.raises(ModelLoadError, match="'<think>' as a control token"):
        PromptTokenizer(changed_tokenizer(change), TEMPLATES["chatml"])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer_file_is_refused(content: str) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be parsed"):
        PromptTokenizer(content)


def test_panic_of_the_library_is_a_refusal_too() -> None:
    def change(state: dict[str, Any]) -> None:
        state["pre_tokenizer"] = {"type": "FixedLength", "length": 0}

    with pytest.raises(ModelLoadError, match="cannot be parsed or encodes nothing"):
        PromptTokenizer(changed_tokenizer(change))

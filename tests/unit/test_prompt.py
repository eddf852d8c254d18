from __future__ import annotations

import dataclasses
from unittest.mock import NonCallableMock

import numpy as np
import pytest
from markupsafe import Markup

from qwen3_reranker import TEMPLATES, InputError, PromptTemplate
from tests import official

HASHES = {
    "qwen3-reranker": "490f5f768280",
    "published-eval": "ccfbc607d05a",
    "chatml": "46014d866025",
}


def test_render_equals_the_model_card() -> None:
    rendered = TEMPLATES["qwen3-reranker"].render(official.INSTRUCTION, "q", "d")
    assert rendered == official.PREFIX + official.format_body(official.INSTRUCTION, "q", "d") + (
        official.SUFFIX
    )


def test_default_instruction_is_the_model_cards() -> None:
    assert TEMPLATES["qwen3-reranker"].default_instruction == official.INSTRUCTION


def test_published_eval_has_double_newlines_and_ends_the_turn_twice() -> None:
    assert TEMPLATES["published-eval"].render("i", "q", "d") == (
        official.PREFIX
        + "<Instruct>: i\n\n<Query>: q\n\n<Document>: d"
        + "<|im_end|>\n"
        + official.SUFFIX
    )


def test_chatml_has_no_think_block() -> None:
    rendered = TEMPLATES["chatml"].render("i", "q", "d")
    assert rendered.endswith("<Document>: d<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", ["{d.__class__}", "{0}", "%s", "{{}}", "\\n"])
def test_user_text_is_never_formatted(text: str) -> None:
    rendered = TEMPLATES["qwen3-reranker"].render(text, text, text)
    assert rendered.count(text) == 3


@pytest.mark.parametrize("field", ["prefix", "suffix", "query_label", "yes", "default_instruction"])
def test_hash_changes_with_every_piece_but_not_the_id(field: str) -> None:
    template = TEMPLATES["qwen3-reranker"]
    assert dataclasses.replace(template, **{field: "x"}).hash != template.hash
    assert dataclasses.replace(template, id="x").hash == template.hash


def test_hashes_are_the_released_ones() -> None:
    # Adapters record these: a change here orphans every adapter trained before.
    assert {id: template.hash[:12] for id, template in TEMPLATES.items()} == HASHES


def test_every_head_of_an_instruction_begins_alike() -> None:
    assert TEMPLATES["qwen3-reranker"].beginning("Find") == "<Instruct>: Find\n<Query>:"
    for template in TEMPLATES.values():
        beginning = template.beginning("Find")
        assert template.head("Find", "q") == beginning + " q" + template.document_label


class Shouting(str):
    """Redefines everything that joins."""

    __slots__ = ()

    def __add__(self, other: str) -> str:
        return "lie"

    __radd__ = __add__
    __str__ = __format__ = __repr__ = lambda self, *_: "lie"

    def rstrip(self, *_: object) -> str:  # type: ignore[override]
        return "lie"


PIECES = [field.name for field in dataclasses.fields(PromptTemplate)]


@pytest.mark.parametrize("kind", [Markup, Shouting, np.str_])
@pytest.mark.parametrize("piece", PIECES)
def test_piece_of_a_subclass_is_its_characters(piece: str, kind: type[str]) -> None:
    plain = dataclasses.replace(TEMPLATES["qwen3-reranker"], id="mine")
    value = getattr(plain, piece)
    odd = kind(value) if isinstance(value, str) else [kind(token) for token in value]
    other = dataclasses.replace(plain, **{piece: odd})
    assert other == plain
    assert (other.hash, hash(other)) == (plain.hash, hash(plain))
    given = ("i & <i>", "q < q", "d > d")
    assert other.render(*given) == plain.render(*given)
    assert other.beginning("i") == plain.beginning("i")
    assert other.as_jinja() == plain.as_jinja()
    kept = getattr(other, piece)
    assert {type(text) for text in ([kept] if isinstance(value, str) else kept)} == {str}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize(
    "value",
    [None, 7, b"yes", NonCallableMock(spec=str), [None], 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_piece_that_is_no_string_is_refused(piece: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{piece} of a template must be a .* Pass the characters"):
        dataclasses.replace(TEMPLATES["chatml"], **{piece: value})


def test_control_tokens_are_no_string_of_characters() -> None:
    with pytest.raises(InputError, match="control_tokens of a template must be a tuple of strings"):
        dataclasses.replace(TEMPLATES["chatml"], control_tokens="<|im_end|>")

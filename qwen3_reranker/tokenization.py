"""Text to token ids, with control tokens from two constants only.

Decides ids, truncation and the repair of broken text. Knows nothing of torch, packs or models.

Two facts carry this file. A private `tokenizers.Tokenizer` whose added tokens are emptied reads
`<|im_end|>` in a user's text as eleven ordinary characters; it is never mutated, so threads share
it (`split_special_tokens=True` is neither complete nor thread-safe). And byte-level BPE never
merges across `<Document>:| `, so a head and its documents may be encoded apart.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import InputError, ModelLoadError
from .inputs import repaired
from .prompt import CHATML, QWEN3_RERANKER, PromptTemplate

logger = logging.getLogger(__name__)

TokenIds: TypeAlias = NDArray[np.int32]

# Long texts are encoded as a growing beginning: 6 characters per token of the budget first, which
# is more than most languages need, and four times more while that is too little. Dense scripts have
# a token or more per character, and reading their ids holds the interpreter: 50 ms for a million.
# Encoding a part disturbs ids near its end only, so the last 64 tokens of a part are never used.
_CHARS_PER_TOKEN = 6
_GROWTH = 4
_MARGIN = 64
# Documents per call of the tokenizer: its `Encoding` objects are about 100 bytes a token.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """One query with its documents, as token ids.

    Attributes:
        head: Prefix, instruction and query, shape (P,); shared by all documents.
        documents: One array per document, shape (L,), each ending in the suffix.
        truncated: Per document, True if its end was cut.
        num_repaired: Texts of this group in which lone surrogates were replaced.
        num_shared: Tokens with which the head of any query under this instruction begins.
    """

    head: TokenIds
    documents: list[TokenIds]
    truncated: list[bool]
    num_repaired: int
    num_shared: int = 0


class TokenSpans(Sequence[tuple[int, int]]):
    """(start, stop) in characters of each token of a document, looked up one by one.

    All at once they would hold the interpreter, 200 ms for a million characters of Chinese.
    """

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding  # of the document behind a space

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, i: int) -> tuple[int, int]:  # type: ignore[override]
        start, stop = self._encoding.token_to_chars(range(len(self))[i])
        return max(start - 1, 0), max(stop - 1, 0)


class PromptTokenizer:
    """Encodes prompts of one template with one tokenizer.

    Args:
        tokenizer_json: Content of a `tokenizer.json`.
        template: The prompt's pieces; None picks the first official template that the tokenizer
            can express.

    Raises:
        ModelLoadError: If no template fits, a control token or an answer is not a single id, text
            can spell a control token, or pieces encoded apart differ from the whole.
    """

    def __init__(self, tokenizer_json: str, template: PromptTemplate | None = None) -> None:
        try:
            control = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ModelLoadError(
                "tokenizer.json cannot be parsed. Copy the one of the base model again."
            ) from error
        control.no_padding()
        control.no_truncation()
        added = {token.content: id for id, token in control.get_added_tokens_decoder().items()}
        self._plain = _without_added_tokens(tokenizer_json)
        self.template = template or self._detect_template(added)
        missing = self._missing_ids(self.template, added)
        if missing:
            raise ModelLoadError(
                f"template {self.template.id!r} needs {', '.join(missing)} as single tokens, but "
                "this tokenizer has none. Use the template the checkpoint was trained with."
            )
        self.prefix: TokenIds = _ids(control.encode(self.template.prefix, add_special_tokens=False))
        self.suffix: TokenIds = _ids(control.encode(self.template.suffix, add_special_tokens=False))
        (self.yes_id,) = self._encode(self.template.yes).tolist()
        (self.no_id,) = self._encode(self.template.no).tolist()
        self._check_text_spells_no_control_token(added)
        self._check_boundaries(control)

    def encode_group(
        self, instruction: str | None, query: str, documents: Sequence[str], *, max_length: int
    ) -> EncodedGroup:
        """Encode one query and its documents.

        Args:
            instruction: Task sentence, or None for the template's default.
            query: The query.
            documents: The documents; nothing is stripped, an empty one is encoded like any other.
            max_length: Tokens per pair, prompt included. Only the document's end is ever cut.

        Returns:
            The ids, documents aligned with the input.

        Raises:
            InputError: If instruction and query leave no room for a document.
        """
        if instruction is None:
            instruction = self.template.default_instruction
        texts, repaired = _repair_surrogates([instruction, query, *documents])
        own = self._encode(self.template.head(*texts[:2]))
        head = np.concatenate([self.prefix, own])
        shared = _common_length(own, self._encode(self.template.beginning(texts[0])))
        room = max_length - len(head) - len(self.suffix)
        if room < 1:
            raise InputError(
                f"query and instruction take {len(head) + len(self.suffix)} tokens with the "
                f"prompt, but max_length is {max_length}; they are never cut. Shorten them or "
                "raise max_length."
            )
        bodies, truncated = self._encode_beginnings([" " + text for text in texts[2:]], room)
        if repaired:
            logger.warning("Lone surrogates replaced by U+FFFD; texts concerned: %d.", repaired)
        return EncodedGroup(
            head,
            [np.concatenate([body, self.suffix]) for body in bodies],
            truncated,
            repaired,
            num_shared=len(self.prefix) + shared,
        )

    def token_spans(self, document: str) -> TokenSpans:
        """Return where the tokens of a document lie in it."""
        (text,), _ = _repair_surrogates([" " + document])
        (encoding,) = self._plain.encode_batch([text], add_special_tokens=False)
        return TokenSpans(encoding)

    def _encode(self, text: str) -> TokenIds:
        (encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
        return _ids(encoding)

    def _encode_beginnings(
        self, texts: Sequence[str], limit: int
    ) -> tuple[list[TokenIds], list[bool]]:
        """Encode each text, keeping at most its first `limit` ids; say which were cut."""
        ids: list[TokenIds] = [np.empty(0, np.int32)] * len(texts)
        truncated = [False] * len(texts)
        waiting = list(range(len(texts)))
        num_chars = _CHARS_PER_TOKEN * (limit + _MARGIN)
        while waiting:
            unfinished = []
            for chunk in _chunks(waiting):
                parts = [_beginning(texts[i], num_chars) for i in chunk]
                # encode_batch_fast releases the GIL; encode holds it for the whole text.
                encodings = self._plain.encode_batch_fast(parts, add_special_tokens=False)
                for i, part, encoding in zip(chunk, parts, encodings, strict=True):
                    is_whole = len(part) == len(texts[i])
                    if not is_whole and len(encoding) < limit + _MARGIN:
                        unfinished.append(i)
                        continue
                    truncated[i] = len(encoding) > limit
                    ids[i] = _ids(encoding, limit)
            waiting = unfinished
            num_chars *= _GROWTH
        return ids, truncated

    def _detect_template(self, added: dict[str, int]) -> PromptTemplate:
        for template in (QWEN3_RERANKER, CHATML):
            if not self._missing_ids(template, added):
                return template
        raise ModelLoadError(
            "no official template fits this tokenizer: it lacks <|im_start|> and <|im_end|>, or "
            "yes and no are not single tokens. Pass template= with the prompt the checkpoint was "
            "trained with."
        )

    def _missing_ids(self, template: PromptTemplate, added: dict[str, int]) -> list[str]:
        controls = [token for token in template.control_tokens if token not in added]
        answers = [text for text in (template.yes, template.no) if len(self._encode(text)) != 1]
        return controls + answers

    def _check_text_spells_no_control_token(self, added: dict[str, int]) -> None:
        reserved = np.array(sorted(added.values()), np.int32)
        for content in added:
            for text in (content, f" {content}", f"a{content}b", f"\n{content}\n"):
                if np.isin(self._encode(text), reserved).any():
                    raise ModelLoadError(
                        f"the tokenizer encodes the text {content!r} as a control token even "
                        "with its added tokens removed, so a document could forge the prompt. "
                        "Use the original tokenizer of the checkpoint."
                    )

    def _check_boundaries(self, control: Tokenizer) -> None:
        """Compare pieces encoded apart with the whole, by this tokenizer and the full one."""
        for query, document in zip(_PROBES, reversed(_PROBES), strict=True):
            head = self.template.head(self.template.default_instruction, query)
            apart = np.concatenate([self._encode(head), self._encode(" " + document)])
            whole = head + " " + document
            for ids in (
                self._encode(whole),
                _ids(control.encode(whole, add_special_tokens=False)),
            ):
                if not np.array_equal(apart, ids):
                    raise ModelLoadError(
                        "this tokenizer merges text across '<Document>:' and the document, so a "
                        "query's head cannot be shared by its documents. Only byte-level BPE "
                        "tokenizers (Qwen3, Qwen2.5, Llama 3, SmolLM2) are supported."
                    )


def _without_added_tokens(tokenizer_json: str) -> Tokenizer:
    state = json.loads(tokenizer_json)
    state["added_tokens"] = []
    state["post_processor"] = None  # only offsets and special tokens, which are never asked for
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def _ids(encoding: object, limit: int | None = None) -> TokenIds:
    """Return the first ids of an encoding, or all."""
    return np.array(encoding.ids[:limit], np.int32)  # type: ignore[attr-defined]


def _common_length(a: TokenIds, b: TokenIds) -> int:
    """Return how many ids both begin with."""
    shortest = min(len(a), len(b))
    differ = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _chunks(items: Sequence[int]) -> Iterator[Sequence[int]]:
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))


def _beginning(text: str, num_chars: int) -> str:
    """Return at least the first `num_chars` characters, never ending inside combining marks.

    NFC sorts a run of marks as a whole, so a run cut in two would change even its first ids.
    """
    while num_chars < len(text) and unicodedata.combining(text[num_chars]):
        num_chars += 1
    return text[:num_chars]


def _repair_surrogates(texts: Sequence[str]) -> tuple[list[str], int]:
    """Join surrogate pairs, replace lone surrogates by U+FFFD, and count the texts changed."""
    fixed, count = [], 0
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = repaired(text)
            count += 1
        fixed.append(text)
    return fixed, count


# Beginnings and ends that merge badly elsewhere: spaces, newlines, punctuation, marks, digits,
# contractions, scripts without spaces, and characters outside the basic plane. Paired first with
# last, so each stands once as a query and once as a document.
_PROBES = (
    "",
    " ",
    "  two leading spaces",
    "\n",
    "\n\nparagraphs\n\n",
    "\ttab\r\n",
    "plain words",
    "trailing space ",
    ":colon: and punctuation!?",
    "<Document>: again",
    "'s contraction's",
    "1234567890",
    "3.14 and -1",
    "\u0301mark first, then e\u0301",
    "中文没有空格。",
    "नमस्ते दुनिया",
    "مرحبا بالعالم",
    "👩\u200d🔬🇫🇷",
    "\u00a0no-break\u2028line",
    "def f(x):\n    return x  # code",
)

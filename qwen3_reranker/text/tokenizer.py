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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import InputError, ModelLoadError
from .prompt import CHATML, QWEN3_RERANKER, PromptTemplate
from .steps import Steps, finish
from .unicode import beginning, repair_surrogates

logger = logging.getLogger(__name__)

TokenIds: TypeAlias = NDArray[np.int32]

# Long texts are encoded as a growing beginning: 6 characters per token of the budget first, which
# is more than most languages need, and four times more while that is too little. Dense scripts have
# a token or more per character, and reading their ids holds the interpreter: 50 ms for a million.
# Encoding a part disturbs ids near its end only, so the last 64 tokens of a part are never used.
_CHARS_PER_TOKEN = 6
_GROWTH = 4
_MARGIN = 64
# A query too long by so many tokens at most is counted to its end, to tell how much too long it is.
_COUNTED = 2048
# Texts per call of the tokenizer, by number and by characters. Its `Encoding` objects are about 100
# bytes a token, and another caller waits for a call's end: 64,000 characters take some 30 ms.
_CHUNK = 256
_CHUNK_CHARS = 64_000
# Where tokens of a whole long document are looked up, characters per call.
_SPAN_CHARS = 128_000


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
    """(start, stop) in characters of each token of a document.

    Args:
        bounds: Shape (tokens, 2).
    """

    def __init__(self, bounds: NDArray[np.int64]) -> None:
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, i: int) -> tuple[int, int]:  # type: ignore[override]
        start, stop = self._bounds[i].tolist()
        return start, stop


@contextmanager
def panic_is_error() -> Iterator[None]:
    """Make a panic of a library in Rust an Exception, which it is not by itself."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError("a library panicked") from error


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
            with panic_is_error():
                self._load(tokenizer_json, template)
        except ModelLoadError:
            raise
        except Exception as error:  # the library raises bare Exception, some of it when it encodes
            raise ModelLoadError(
                "tokenizer.json cannot be parsed or encodes nothing. Copy the one of the base "
                "model again."
            ) from error

    def _load(self, tokenizer_json: str, template: PromptTemplate | None) -> None:
        control = Tokenizer.from_str(tokenizer_json)
        self._plain, self._longest = _without_added_tokens(tokenizer_json)
        control.no_padding()
        control.no_truncation()
        added = {token.content: id for id, token in control.get_added_tokens_decoder().items()}
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
        return finish(self.group_steps(instruction, query, documents, max_length=max_length))

    def group_steps(
        self, instruction: str | None, query: str, documents: Sequence[str], *, max_length: int
    ) -> Steps[EncodedGroup]:
        """Do what `encode_group` does, some documents to a step.

        Of a text no more is read than can fit: a few characters for each token there is room for,
        whatever its length.

        Raises:
            InputError: As `encode_group`.
        """
        if instruction is None:
            instruction = self.template.default_instruction
        texts, repaired = repair_surrogates([instruction, query])
        ids, is_cut = yield from self._beginnings(
            [self.template.head(*texts)], max_length + _COUNTED
        )
        head = np.concatenate([self.prefix, ids[0]])
        room = max_length - len(head) - len(self.suffix)
        if room < 1:
            least = "more than " if is_cut[0] else ""
            raise InputError(
                f"query and instruction take {least}{len(head) + len(self.suffix)} tokens with the "
                f"prompt, but max_length is {max_length}; they are never cut. Shorten them or "
                "raise max_length."
            )
        shared = _common_length(ids[0], self._encode(self.template.beginning(texts[0])))
        encoded, truncated = [], []
        for chunk in _chunks(documents, self._first_chars(room)):
            fixed, count = repair_surrogates([documents[i] for i in chunk])
            repaired += count
            bodies, cut = yield from self._beginnings([" " + text for text in fixed], room)
            encoded += [np.concatenate([body, self.suffix]) for body in bodies]
            truncated += cut
        if repaired:
            logger.warning("Lone surrogates replaced by U+FFFD; texts concerned: %d.", repaired)
        return EncodedGroup(
            head, encoded, truncated, repaired, num_shared=len(self.prefix) + shared
        )

    def cut_steps(self, document: str, max_tokens: int) -> Steps[str]:
        """Return a document without what is past its first tokens; only its beginning is read."""
        (text,), _ = repair_surrogates([document])
        num_chars = self._first_chars(max_tokens)
        while True:
            part = beginning(text, num_chars)
            spans = yield from self.span_steps(part)
            if len(part) == len(text) or len(spans) >= max_tokens + _MARGIN:
                break
            num_chars = self._more_chars(num_chars, max_tokens)
        return document if len(spans) <= max_tokens else part[: spans[max_tokens - 1][1]]

    def span_steps(self, document: str) -> Steps[TokenSpans]:
        """Return where the tokens of a document lie in it.

        A document longer than 128,000 characters is read part by part; where two parts meet, a
        token may be split in two.
        """
        (text,), _ = repair_surrogates([" " + document])
        found, start = [], 0
        while start < len(text):
            part = text[start : start + _SPAN_CHARS]
            yield len(part)
            (encoding,) = self._plain.encode_batch([part], add_special_tokens=False)
            found.append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + start)
            start += len(part)
        # One less: the text stands behind a space.
        return TokenSpans(np.maximum(np.concatenate(found) - 1, 0))

    def token_spans(self, document: str) -> TokenSpans:
        """Do what `span_steps` does at once."""
        return finish(self.span_steps(document))

    def _encode(self, text: str) -> TokenIds:
        (encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
        return _ids(encoding)

    def _first_chars(self, limit: int) -> int:
        """Return how many characters of a text are read first, for so many tokens."""
        return _CHARS_PER_TOKEN * (limit + _MARGIN)

    def _beginnings(
        self, texts: Sequence[str], limit: int
    ) -> Steps[tuple[list[TokenIds], list[bool]]]:
        """Encode each text, keeping at most its first `limit` ids; say which were cut."""
        ids: list[TokenIds] = [np.empty(0, np.int32)] * len(texts)
        truncated = [False] * len(texts)
        waiting: Sequence[int] = range(len(texts))
        num_chars = self._first_chars(limit)
        while waiting:
            unfinished = []
            for chunk in _chunks([texts[i] for i in waiting], num_chars):
                rows = [waiting[i] for i in chunk]
                parts = [beginning(texts[i], num_chars) for i in rows]
                yield sum(map(len, parts))
                # encode_batch_fast releases the GIL; encode holds it for the whole text.
                encodings = self._plain.encode_batch_fast(parts, add_special_tokens=False)
                for i, encoding in zip(rows, encodings, strict=True):
                    is_whole = len(texts[i]) <= num_chars
                    if not is_whole and len(encoding) < limit + _MARGIN:
                        unfinished.append(i)
                        continue
                    truncated[i] = len(encoding) > limit
                    ids[i] = _ids(encoding, limit)
                del encodings
            waiting = unfinished
            num_chars = self._more_chars(num_chars, limit)
        return ids, truncated

    def _more_chars(self, num_chars: int, limit: int) -> int:
        """Return how many characters are read next where `num_chars` had too few tokens."""
        # As many as the longest tokens have: enough for all texts but those that NFC shortens.
        enough = self._longest * (limit + _MARGIN)
        more = _GROWTH * num_chars
        return enough if num_chars < enough < more else more

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


def _without_added_tokens(tokenizer_json: str) -> tuple[Tokenizer, int]:
    """Return a tokenizer that knows no added token, and its longest token's number of bytes."""
    state = json.loads(tokenizer_json)
    state["added_tokens"] = []
    state["post_processor"] = None  # only offsets and special tokens, which are never asked for
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state)), max(map(len, state["model"]["vocab"]))


def _ids(encoding: object, limit: int | None = None) -> TokenIds:
    """Return the first ids of an encoding, or all."""
    return np.array(encoding.ids[:limit], np.int32)  # type: ignore[attr-defined]


def _common_length(a: TokenIds, b: TokenIds) -> int:
    """Return how many ids both begin with."""
    shortest = min(len(a), len(b))
    differ = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _chunks(texts: Sequence[str], num_chars: int) -> Iterator[range]:
    """Yield the places of texts that are encoded at once, if so much is read of each."""
    start = read = 0
    for place, text in enumerate(texts):
        length = min(len(text), num_chars)
        if place > start and (place - start == _CHUNK or read + length > _CHUNK_CHARS):
            yield range(start, place)
            start, read = place, 0
        read += length
    if start < len(texts):
        yield range(start, len(texts))


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

"""Documents longer than the limit, read as overlapping windows instead of cut.

Decides where windows begin and end and how their scores become one. A window is a piece of the
document's text, encoded like any document, so that its score is the one that piece would get alone.
Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal, TypeAlias

from .steps import Steps
from .strings import repaired
from .tokenizer import EncodedGroup, PromptTokenizer

WindowScore: TypeAlias = Literal["max", "mean"]

_OVERLAP = 8
"""A window repeats about an eighth of the one before, so that no sentence is only seen cut."""

_LEAST_OVERLAP = 3
"""Tokens: a piece encoded by itself may take more than it did in the document, and be cut."""

Piece: TypeAlias = tuple[int, int]
"""Start and stop in characters of a document."""


def window_steps(
    tokenizer: PromptTokenizer,
    instruction: str | None,
    query: str,
    documents: Sequence[str],
    *,
    max_length: int,
    max_windows: int | None,
) -> Steps[tuple[EncodedGroup, list[list[Piece] | None], list[bool]]]:
    """Encode a query and its documents, long ones as windows, in steps.

    Args:
        tokenizer: Encodes prompts.
        instruction: Task sentence, or None for the template's default.
        query: The query.
        documents: The documents.
        max_length: Tokens per pair, prompt included.
        max_windows: Windows of one document from its beginning; None for all.

    Returns:
        The group, whose documents are windows, those of one document side by side; for each
        document its windows, or None if it is read whole; whether some of it is in no window.

    Raises:
        InputError: If instruction and query leave no room for a document.
    """
    whole = yield from tokenizer.group_steps(instruction, query, documents, max_length=max_length)
    if not any(whole.truncated):
        return whole, [None] * len(documents), whole.truncated
    room = max_length - len(whole.head) - len(tokenizer.suffix)
    pieces: list[list[Piece] | None] = [None] * len(documents)
    ids, truncated = [], [False] * len(documents)
    for i, document in enumerate(documents):
        if not whole.truncated[i]:
            ids.append(whole.documents[i])
            continue
        text = repaired(document)
        found = yield from _windows(tokenizer, text, room)
        kept = found[:max_windows]
        texts = [text[start:stop] for start, stop in kept]
        windows = yield from tokenizer.group_steps(instruction, query, texts, max_length=max_length)
        ids += windows.documents
        truncated[i] = len(kept) < len(found) or _loses_text(tokenizer, kept, texts, windows, room)
        places = _places(document, text)
        pieces[i] = [(places[start], places[stop]) for start, stop in kept]
    return replace(whole, documents=ids, truncated=[False] * len(ids)), pieces, truncated


def _windows(tokenizer: PromptTokenizer, document: str, room: int) -> Steps[list[Piece]]:
    """Return windows of which the last is read to its end.

    A piece that begins inside of a document takes a token or two more than it did there. What that
    cuts off a window is in the next one, but for the last.
    """
    spans = yield from tokenizer.span_steps(document)
    for slack in range(_OVERLAP):
        found = split(spans, max(room - slack, 1))
        found[-1] = (found[-1][0], len(document))
        if len(tokenizer.token_spans(document[found[-1][0] :])) <= room:
            break
    return found


def _loses_text(
    tokenizer: PromptTokenizer,
    pieces: Sequence[Piece],
    texts: Sequence[str],
    windows: EncodedGroup,
    room: int,
) -> bool:
    """Say whether what a window has no room for is not in the next one either."""
    for i, (start, _) in enumerate(pieces):
        if windows.truncated[i]:
            read = start + tokenizer.token_spans(texts[i])[room][0]
            if i + 1 == len(pieces) or read < pieces[i + 1][0]:
                return True
    return False


def _places(document: str, text: str) -> Sequence[int]:
    """Return where each character of the repaired text begins in the document, and its end."""
    if len(text) == len(document):  # no surrogates, or lone ones
        return range(len(text) + 1)
    places = [0]
    for char in text:
        is_pair = char > "\uffff" and "\ud800" <= document[places[-1]] <= "\udbff"
        places.append(places[-1] + 1 + is_pair)
    return places


def split(spans: Sequence[Piece], room: int) -> list[Piece]:
    """Return windows of at most `room` tokens that overlap, evenly spread from end to end.

    Args:
        spans: (start, stop) of each token, in characters.
        room: Tokens of a window.

    Returns:
        (start, stop) of each window, in characters.

    Example:
        >>> split([(i, i + 1) for i in range(80)], 32)
        [(0, 32), (24, 56), (48, 80)]
    """
    last = max(len(spans) - room, 0)  # first token of the last window
    step = max(room - max(room // _OVERLAP, _LEAST_OVERLAP), 1)
    count = -(-last // step) + 1
    starts = [round(i * last / max(count - 1, 1)) for i in range(count)]
    return [(spans[s][0], spans[min(s + room, len(spans)) - 1][1]) for s in starts]


def fold(
    log_odds: Sequence[float],
    pieces: Sequence[list[Piece] | None],
    window_score: WindowScore,
) -> tuple[list[float], list[Piece | None]]:
    """Return a score for each document and the window that scored best, None for a whole one.

    Example:
        >>> fold([0.5, -1.0, 3.0], [None, [(0, 9), (8, 17)]], "max")
        ([0.5, 3.0], [None, (8, 17)])
    """
    scores: list[float] = []
    best: list[Piece | None] = []
    place = 0
    for windows in pieces:
        found = log_odds[place : place + (1 if windows is None else len(windows))]
        place += len(found)
        scores.append(max(found) if window_score == "max" else fmean(found))
        best.append(None if windows is None else windows[found.index(max(found))])
    return scores, best

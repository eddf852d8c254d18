"""Documents longer than the limit, read as overlapping windows instead of cut.

Decides where windows begin and end and how their scores become one. A window is a piece of the
document's text, encoded like any document, so that its score is the one that piece would get alone.
Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal, TypeAlias

from .tokenization import EncodedGroup, PromptTokenizer

WindowScore: TypeAlias = Literal["max", "mean"]

_OVERLAP = 8
"""A window repeats about an eighth of the one before, so that no sentence is only seen cut."""


Piece: TypeAlias = tuple[int, int]
"""Start and stop in characters of a document."""


def encode_windows(
    tokenizer: PromptTokenizer,
    instruction: str | None,
    query: str,
    documents: Sequence[str],
    *,
    max_length: int,
    max_windows: int | None,
) -> tuple[EncodedGroup, list[list[Piece] | None], list[bool]]:
    """Encode a query and its documents, long ones as windows.

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
    whole = tokenizer.encode_group(instruction, query, documents, max_length=max_length)
    if not any(whole.truncated):
        return whole, [None] * len(documents), whole.truncated
    pieces: list[list[Piece] | None] = []
    texts, truncated = [], []
    for document, ids, is_long in zip(documents, whole.documents, whole.truncated, strict=True):
        if not is_long:
            pieces.append(None)
            texts.append(document)
            truncated.append(False)
            continue
        found = _windows(tokenizer, document, len(ids) - len(tokenizer.suffix))
        kept = found[:max_windows]
        pieces.append(kept)
        texts += [document[start:stop] for start, stop in kept]
        truncated.append(len(kept) < len(found))
    group = tokenizer.encode_group(instruction, query, texts, max_length=max_length)
    place = -1
    for i, windows in enumerate(pieces):  # of the last window no later one has the end
        place += 1 if windows is None else len(windows)
        truncated[i] = truncated[i] or group.truncated[place]
    return group, pieces, truncated


def _windows(tokenizer: PromptTokenizer, document: str, room: int) -> list[Piece]:
    """Return windows of which the last is read to its end.

    A piece that begins inside of a document takes a token or two more than it did there. What that
    cuts off a window is in the next one, but for the last.
    """
    spans = tokenizer.token_spans(document)
    for slack in range(_OVERLAP):
        found = split(spans, max(room - slack, 1))
        found[-1] = (found[-1][0], len(document))
        if len(tokenizer.token_spans(document[found[-1][0] :])) <= room:
            break
    return found


def split(spans: Sequence[Piece], room: int) -> list[Piece]:
    """Return windows of at most `room` tokens that overlap, evenly spread from end to end.

    Args:
        spans: (start, stop) of each token, in characters.
        room: Tokens of a window.

    Returns:
        (start, stop) of each window, in characters.

    Example:
        >>> split([(i, i + 1) for i in range(20)], 8)
        [(0, 8), (6, 14), (12, 20)]
    """
    last = max(len(spans) - room, 0)  # first token of the last window
    step = max(room - room // _OVERLAP, 1)
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

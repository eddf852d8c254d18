"""Which tokens travel together: pure planning, before any tensor exists.

A pack is one row of tokens, `[head | document | document | head | document ...]`: every document
follows the head of its query, nothing is padded, and one forward scores them all. The beginning
of a head may stay outside, computed once for many packs. This file decides who sits in which pack,
at which position, and what stays outside. Knows nothing of torch or text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .tokenization import EncodedGroup, TokenIds


@dataclass(slots=True)
class Group:
    """A head and its distinct documents.

    Attributes:
        head: Token ids, shape (P,).
        documents: Token ids of each document, shape (L,), suffix included.
        num_shared: Tokens at the head's beginning that other queries share, less than P.
    """

    head: TokenIds
    documents: list[TokenIds] = field(default_factory=list)
    num_shared: int = 0


@dataclass(frozen=True, slots=True)
class Seat:
    """Documents of one group that travel in one pack.

    Attributes:
        group: Position of the group.
        documents: Positions in its `documents`.
        num_cached: Tokens at the head's beginning that stay outside the row.
    """

    group: int
    documents: tuple[int, ...]
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Where a group lies in a pack: its head, then its documents without gaps.

    Attributes:
        head: The part of the head that is in the row; it may be empty.
        documents: The documents.
        outside: Ids of the head's beginning that is not in the row, shape (tokens,), or None.
    """

    head: slice
    documents: tuple[slice, ...]
    outside: TokenIds | None = None


@dataclass(frozen=True, slots=True)
class Pack:
    """One row for the model.

    Attributes:
        token_ids: Shape (tokens,).
        position_ids: Shape (tokens,): up to P-1 in a head, P..P+L-1 in each of its documents.
        spans: Groups in the order of the row.
        backend: Name of the attention backend, a key of `attention.BACKENDS`.
    """

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    spans: tuple[Span, ...]
    backend: str

    @property
    def last_tokens(self) -> list[int]:
        """Position of each document's last token, whose hidden state is its score."""
        return [document.stop - 1 for span in self.spans for document in span.documents]


def merge_duplicates(
    groups: Sequence[EncodedGroup],
) -> tuple[list[Group], list[list[tuple[int, int]]]]:
    """Join groups with the same head and keep each distinct document once.

    Equal ids give equal scores, so a duplicate costs nothing and ties exactly with its twin.

    Returns:
        The merged groups and, for each input group and document, its (group, document) in them.

    Example:
        >>> ids = lambda *values: np.array(values, np.int32)
        >>> group = EncodedGroup(ids(1, 2), [ids(7), ids(8), ids(7)], [False] * 3, 0)
        >>> merged, places = merge_duplicates([group])
        >>> len(merged[0].documents), places
        (2, [[(0, 0), (0, 1), (0, 0)]])
    """
    merged: list[Group] = []
    group_of: dict[bytes, int] = {}
    document_of: dict[tuple[int, bytes], int] = {}
    places = []
    for group in groups:
        g = group_of.setdefault(group.head.tobytes(), len(merged))
        if g == len(merged):
            merged.append(Group(group.head, num_shared=group.num_shared))
        row = []
        for document in group.documents:
            d = document_of.setdefault((g, document.tobytes()), len(merged[g].documents))
            if d == len(merged[g].documents):
                merged[g].documents.append(document)
            row.append((g, d))
        places.append(row)
    return merged, places


def plan_packs(
    groups: Sequence[Group],
    *,
    max_batch_tokens: int,
    max_attention_tokens: int | None = None,
    max_cached_tokens: int = 0,
) -> list[list[Seat]]:
    """Seat every document in a pack within two budgets.

    Longest documents of a group go first: running out of memory happens at once, not after an
    hour, and a padded backend finds neighbours of similar length. A group that fits one pack is
    not split, because each part computes the head again. For the same reason a pack may hold as
    many document tokens as its head has: a long query with short documents costs at most twice
    its documents, and a pack at most twice the head. A pair above the budget travels alone.

    What stays outside the row depends on the groups alone, never on what is cached already: the
    whole head of a group that needs several packs, else what other queries share.

    Args:
        groups: Heads and distinct documents.
        max_batch_tokens: Limit of P + sum(L) over a pack, what the linear layers see.
        max_attention_tokens: Limit of sum(P + L) over a pack's documents, L being the longest of
            its group there, for backends that copy the head beside each document and pad; None
            if the backend does neither.
        max_cached_tokens: Longest beginning of a head that may stay outside.

    Returns:
        Packs of seats; every document has exactly one seat.

    Example:
        >>> ids = lambda length: np.zeros(length, np.int32)
        >>> packs = plan_packs([Group(ids(4), [ids(3), ids(9), ids(2)])], max_batch_tokens=14)
        >>> [[seat.documents for seat in pack] for pack in packs]
        [[(1,)], [(0, 2)]]
    """
    packs: list[list[Seat]] = []
    pack: list[Seat] = []
    linear = attention = 0

    def fits(num_linear: int, num_attention: int, head: int) -> bool:
        return linear + num_linear <= max(max_batch_tokens, 2 * head) and (
            max_attention_tokens is None or attention + num_attention <= max_attention_tokens
        )

    for g, group in enumerate(groups):
        lengths = [len(document) for document in group.documents]
        widest = len(group.head) + max(lengths, default=0)
        cached = group.num_shared if group.num_shared <= max_cached_tokens else 0
        head = len(group.head) - cached  # what each of its packs computes
        if not fits(head + sum(lengths), len(lengths) * widest, head):
            if pack:
                packs.append(pack)
                pack, linear, attention = [], 0, 0
            needs_many = not fits(head + sum(lengths), len(lengths) * widest, head)
            if needs_many and len(lengths) > 1 and len(group.head) <= max_cached_tokens:
                cached, head = len(group.head), 0
        seated: list[int] = []
        for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
            extra = lengths[d] if seated else head + lengths[d]
            # As wide as the seat's first and longest, because a padded backend fills up to it.
            width = len(group.head) + lengths[seated[0] if seated else d]
            if not fits(extra, width, head) and (pack or seated):
                if seated:
                    pack.append(Seat(g, tuple(seated), cached))
                packs.append(pack)
                pack, seated, linear, attention = [], [], 0, 0
                extra, width = head + lengths[d], len(group.head) + lengths[d]
            seated.append(d)
            linear += extra
            attention += width
        if seated:
            pack.append(Seat(g, tuple(seated), cached))
    if pack:
        packs.append(pack)
    return packs


def build_pack(groups: Sequence[Group], seats: Iterable[Seat], *, backend: str) -> Pack:
    """Lay the seated documents out as one row.

    Example:
        >>> group = Group(np.array([1, 2], np.int32), [np.array([7, 8, 9], np.int32)] * 2)
        >>> pack = build_pack([group], [Seat(0, (0, 1))], backend="documents")
        >>> pack.position_ids.tolist(), pack.last_tokens
        ([0, 1, 2, 3, 4, 2, 3, 4], [4, 7])
    """
    token_ids: list[TokenIds] = []
    position_ids: list[NDArray[np.int64]] = []
    spans = []
    start = 0
    for seat in seats:
        group = groups[seat.group]
        head, outside = len(group.head), seat.num_cached
        token_ids.append(group.head[outside:])
        position_ids.append(np.arange(outside, head))
        stop = start + head - outside
        span_head, span_documents = slice(start, stop), []
        for d in seat.documents:
            document = group.documents[d]
            token_ids.append(document)
            position_ids.append(np.arange(head, head + len(document)))
            span_documents.append(slice(stop, stop + len(document)))
            stop += len(document)
        spans.append(
            Span(span_head, tuple(span_documents), group.head[:outside] if outside else None)
        )
        start = stop
    return Pack(
        np.concatenate(token_ids).astype(np.int64),
        np.concatenate(position_ids).astype(np.int64),
        tuple(spans),
        backend,
    )

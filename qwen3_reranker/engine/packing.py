"""Which tokens travel together: pure planning, before any tensor exists.

A pack is one row of tokens, `[head | document | document | head | document ...]`: every document
follows the head of its query, no document is padded, and one forward scores them all. The beginning
of a head may stay outside, computed once for many packs. This file decides who sits in which pack,
at which position, and what stays outside. Knows nothing of torch or text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..text.tokenizer import EncodedGroup, TokenIds


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


@dataclass(frozen=True, slots=True)
class Budget:
    """What a pack may hold.

    Attributes:
        max_batch_tokens: Limit of P + sum(L) over a pack, what the linear layers see.
        max_attention_tokens: Limit of sum(P + L) over a pack's documents, L being the longest of
            its group there, for backends that copy the head beside each document and pad; None
            if the backend does neither.
        max_cached_tokens: Most tokens of heads' beginnings that may stay outside for a request.
        max_documents: Documents per pack; None sets no limit, 1 makes scores independent of
            company to the last bit.
    """

    max_batch_tokens: int
    max_attention_tokens: int | None = None
    max_cached_tokens: int = 0
    max_documents: int | None = None


@dataclass(slots=True)
class Room:
    """What a pack that is being filled holds already."""

    budget: Budget
    linear: int = 0
    attention: int = 0
    documents: int = 0

    def fits(self, linear: int, attention: int, documents: int, head: int) -> bool:
        """Say whether this much more fits; `head` is what each pack of the group computes."""
        budget = self.budget
        return (
            self.linear + linear <= max(budget.max_batch_tokens, 2 * head)
            and (
                budget.max_attention_tokens is None
                or self.attention + attention <= budget.max_attention_tokens
            )
            and (budget.max_documents is None or self.documents + documents <= budget.max_documents)
        )

    def add(self, linear: int, attention: int) -> None:
        """Count a document in."""
        self.linear += linear
        self.attention += attention
        self.documents += 1


class Line:
    """Documents that wait for seats, in the order they get them.

    Longest documents of a group go first: running out of memory happens at once, not after an
    hour, and a padded backend finds neighbours of similar length. A group that fits one pack is
    not split, because each part computes the head again. For the same reason a pack may hold as
    many document tokens as its head has: a long query with short documents costs at most twice
    its documents, and a pack at most twice the head. A pair above the budget travels alone.

    What stays outside the row depends on the request and the budget alone, never on what is cached
    already: the whole head of a group that needs several packs, else what other queries share,
    unless the request has more different beginnings than can be kept.

    Args:
        groups: Heads and distinct documents.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._group = 0
        self._order: deque[int] | None = None  # of the present group; None before it is begun
        self._cached = 0
        shared = {group.head[: group.num_shared].tobytes(): group.num_shared for group in groups}
        self._num_shared = sum(shared.values())  # tokens of all beginnings, each once
        self._pass_over_empty()

    def __bool__(self) -> bool:
        """Say whether documents are left."""
        return self._group < len(self._groups)

    def fill(self, room: Room) -> list[Seat]:
        """Seat the next documents, as many as fit; at least one in an empty room."""
        seats: list[Seat] = []
        while self:
            if self._order is None and not self._begin_group(room):
                break
            taken = self._take(room)
            if taken:
                seats.append(Seat(self._group, tuple(taken), self._cached))
            if self._order:
                break
            self._order = None
            self._group += 1
            self._pass_over_empty()
        return seats

    def _begin_group(self, room: Room) -> bool:
        """Decide how the next group travels, unless it had better wait for a room of its own.

        One that needs several packs does not wait where its head is kept: its call may come beside
        short ones that never end, which would take the first seats of every pack.
        """
        group, budget = self._groups[self._group], room.budget
        lengths = [len(document) for document in group.documents]
        cached = group.num_shared if self._num_shared <= budget.max_cached_tokens else 0
        head = len(group.head) - cached
        whole = (
            head + sum(lengths), len(lengths) * (len(group.head) + max(lengths)), len(lengths), head
        )  # fmt: skip
        if not room.fits(*whole):
            is_splittable = len(lengths) > 1 and len(group.head) <= budget.max_cached_tokens
            if is_splittable and not Room(budget).fits(*whole):
                cached = len(group.head)
            elif room.documents:
                return False
        self._cached = cached
        self._order = deque(sorted(range(len(lengths)), key=lambda d: -lengths[d]))
        return True

    def _take(self, room: Room) -> list[int]:
        group = self._groups[self._group]
        head = len(group.head) - self._cached  # what each of its packs computes
        taken: list[int] = []
        while self._order:
            length = len(group.documents[self._order[0]])
            linear = length if taken else head + length
            # As wide as the seat's first and longest, because a padded backend fills up to it.
            width = len(group.head) + (len(group.documents[taken[0]]) if taken else length)
            if not room.fits(linear, width, 1, head) and room.documents:
                break
            taken.append(self._order.popleft())
            room.add(linear, width)
        return taken

    def _pass_over_empty(self) -> None:
        while self and not self._groups[self._group].documents:
            self._group += 1


def plan_packs(groups: Sequence[Group], budget: Budget) -> list[list[Seat]]:
    """Seat every document of a request in packs of its own.

    Returns:
        Packs of seats; every document has exactly one seat.

    Example:
        >>> ids = lambda length: np.zeros(length, np.int32)
        >>> packs = plan_packs([Group(ids(4), [ids(3), ids(9), ids(2)])], Budget(14))
        >>> [[seat.documents for seat in pack] for pack in packs]
        [[(1,)], [(0, 2)]]
    """
    line, packs = Line(groups), []
    while line:
        packs.append(line.fill(Room(budget)))
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

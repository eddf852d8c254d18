"""A call as the engine holds it: what came, what is left of it, and whose score is whose.

Decides which distinct documents a call has, how they are named to its caller, and when it is
complete. Knows nothing of packs in flight, threads or faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..call.futures import LockFreeFuture
from ..errors import NonFiniteScoreError
from ..text.tokenizer import EncodedGroup
from .packing import Group, Line, Seat, merge_duplicates
from .score_cache import ScoreCache

Progress = Callable[[int], object]
"""Called from the owner thread after each pack with the number of distinct documents in it."""

Name = Callable[[int, int], str]
"""Returns how the caller knows a document: of which group, and which of its documents."""


def place_of(group: int, document: int) -> str:
    """Return a document's place in the groups of a request."""
    return f"documents[{group}][{document}]"


@dataclass(frozen=True, slots=True)
class Scores:
    """What one request gets back.

    Attributes:
        log_odds: One float32 array per group, aligned with its documents.
        tokens: Tokens of its packs that the model computed; beginnings kept for many do not count.
    """

    log_odds: list[NDArray[np.float32]]
    tokens: int


ScoresFuture: TypeAlias = LockFreeFuture[Scores]


@dataclass(slots=True, eq=False)
class Request:
    """A call as it waits: what came, and once it has begun what is left of it.

    Attributes:
        encoded: What is to be scored.
        progress: Told of scored documents, or None.
        future: Where the caller waits.
        arrived: When it came, on the monotonic clock.
        served: Virtual time: tokens that it has been served, behind those of whoever came before.
        tokens: Tokens computed for it so far.
        is_new: Whether none of its documents has been in a pack.
        is_over: Whether its caller has been answered.
        groups: Heads and the distinct documents whose scores are not known yet.
        line: Those documents, waiting for seats.
        left: How many of them have no score.
        tokens_left: Tokens of those that have had no seat yet, about: heads count once.
        name: How its caller knows the documents.
        second_error: Class of the error by which a second try for scores that are not finite has
            failed; empty if none has.
    """

    encoded: Sequence[EncodedGroup]
    progress: Progress | None
    future: ScoresFuture = field(default_factory=LockFreeFuture)
    arrived: float = field(default_factory=monotonic)
    served: float = 0.0
    tokens: int = 0
    is_new: bool = True
    is_over: bool = False
    groups: list[Group] = field(default_factory=list)
    line: Line = field(default_factory=lambda: Line([]))
    left: int = 0
    tokens_left: int = 0
    name: Name = place_of
    second_error: str = ""
    _all_groups: list[Group] = field(default_factory=list)
    _places: list[list[tuple[int, int]]] = field(default_factory=list)
    _log_odds: list[NDArray[np.float32]] = field(default_factory=list)
    _unknown: list[NDArray[np.int64]] = field(default_factory=list)

    def begin(self, known: ScoreCache | None) -> int:
        """Find out what there is to do; return how many distinct documents need no model."""
        self._all_groups, self._places = merge_duplicates(self.encoded)
        self._log_odds = [_recall(group, known) for group in self._all_groups]
        self._unknown = [np.flatnonzero(np.isnan(row)) for row in self._log_odds]
        self.groups = [
            Group(group.head, [group.documents[d] for d in missing], group.num_shared)
            for group, missing in zip(self._all_groups, self._unknown, strict=True)
        ]
        self.line = Line(self.groups)
        self.left = sum(map(len, self._unknown))
        self.tokens_left = sum(
            len(group.head) + sum(map(len, group.documents)) for group in self.groups
        )
        return sum(len(group.documents) for group in self._all_groups) - self.left

    def served_after(self, most: int) -> float:
        """Return what it will have been served with its next pack, of so many tokens at most."""
        return self.served + min(max(self.tokens_left, 0), most)

    def serve(self, tokens: int) -> None:
        """Count tokens of a pack."""
        self.served += tokens
        self.tokens_left -= tokens

    def num_tokens(self, seat: Seat) -> int:
        """Return the tokens that a seat takes in a row."""
        group = self.groups[seat.group]
        head = len(group.head) - seat.num_cached
        return head + sum(len(group.documents[d]) for d in seat.documents)

    def name_of(self, seat: Seat) -> str:
        """Return how the caller knows a seat's first document."""
        wanted = (seat.group, int(self._unknown[seat.group][seat.documents[0]]))
        return next(
            self.name(g, d)
            for g, row in enumerate(self._places)
            for d, place in enumerate(row)
            if place == wanted
        )

    def take(self, seats: Sequence[Seat], scored: NDArray[np.float32]) -> int:
        """Keep the scores of these seats; return how many documents they are."""
        start = 0
        for seat in seats:
            stop = start + len(seat.documents)
            row = self._unknown[seat.group][list(seat.documents)]
            self._log_odds[seat.group][row] = scored[start:stop]
            self.tokens += self.num_tokens(seat)
            start = stop
        self.left -= start
        return start

    def scores(self) -> Scores:
        """Return what the caller gets once nothing is left.

        Raises:
            NonFiniteScoreError: If a score is NaN or infinite.
        """
        aligned = [
            np.array([self._log_odds[g][d] for g, d in row], np.float32) for row in self._places
        ]
        bad = [
            (g, int(d)) for g, row in enumerate(aligned) for d in np.flatnonzero(~np.isfinite(row))
        ]
        if bad:
            again = (
                f"and in float32 it failed with {self.second_error}. Free memory, or use "
                "dtype='float32'."
                if self.second_error
                else "in float32, too. Check the weights: training that diverged or a file that "
                "was damaged would explain it."
            )
            raise NonFiniteScoreError(
                f"the model returned NaN or infinity for {len(bad)} documents, the first is "
                f"{self.name(*bad[0])}, {again}"
            )
        return Scores(aligned, self.tokens)

    def distinct(self) -> Iterator[tuple[bytes, float]]:
        """Yield the key and the log-odds of each distinct document."""
        for group, row in zip(self._all_groups, self._log_odds, strict=True):
            for document, value in zip(group.documents, row.tolist(), strict=True):
                yield ScoreCache.key(group.head, document), value


def _recall(group: Group, known: ScoreCache | None) -> NDArray[np.float32]:
    """Return the log-odds known of each document, NaN for the others."""
    row = np.full(len(group.documents), np.nan, np.float32)
    if known is not None:
        for d, document in enumerate(group.documents):
            value = known.find(ScoreCache.key(group.head, document))
            row[d] = np.nan if value is None else value
    return row

"""Forwards that fail: smaller packs, callers one by one, a second try in higher precision.

Decides what becomes of a pack whose forward runs out of memory, raises, or returns scores that are
not finite. Every document comes out once, with a score or with the error of its caller. Knows
nothing of queues, threads and whose turn it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import DocumentTooLargeError, Qwen3RerankerError
from .packing import Budget, Pack, Seat, build_pack
from .request import Request

logger = logging.getLogger(__name__)

_PATIENCE = 64
"""Packs that fit, one after the other, before twice as much is tried again: memory that ran out
may have been another process's, and a pack that does not fit is computed once more in halves."""

Score = Callable[[Pack], NDArray[np.float32]]
Part: TypeAlias = tuple[Request, list[Seat]]
"""What one request has in a pack."""


class Forwards:
    """Runs packs, and knows what fits into memory.

    Args:
        score: Returns the log-odds of a pack, shape (documents,). May raise MemoryError.
        rescore: Like `score` in higher precision, or None.
        backend: Attention backend of the packs.
        budget: What a pack may hold at first.

    Attributes:
        budget: What a pack may hold; halved when memory runs out, and doubled again later.
    """

    def __init__(
        self, score: Score, rescore: Score | None, *, backend: str, budget: Budget
    ) -> None:
        self._score = score
        self._rescore = rescore
        self._backend = backend
        self.budget = self._most = budget
        self._num_fitted = 0  # packs since memory ran out, or the budget grew

    def run(
        self, parts: Sequence[Part]
    ) -> Iterator[tuple[Part, NDArray[np.float32] | BaseException]]:
        """Score a pack, and on failure its halves or its requests one by one.

        A request that is over by the time its part comes up is left out.

        Yields:
            Parts with their log-odds in the order of their documents, or with the error that ends
            the request.
        """
        parts = [part for part in parts if not part[0].is_over]
        if not parts:
            return
        scored = _try(self._score, _build(parts, self._backend))
        if isinstance(scored, MemoryError):
            yield from self._halve(parts)
        elif not isinstance(scored, BaseException):
            self._grow()
            ends = np.cumsum([sum(len(seat.documents) for seat in seats) for _, seats in parts])
            yield from zip(parts, np.split(self._corrected(parts, scored), ends[:-1]), strict=True)
        elif len(parts) > 1:  # one bad document must fail its own caller alone
            for part in parts:
                yield from self.run([part])
        else:
            yield parts[0], scored
        del scored  # an error's traceback leads back to this frame: no cycle, it is freed at once

    def _halve(
        self, parts: Sequence[Part]
    ) -> Iterator[tuple[Part, NDArray[np.float32] | BaseException]]:
        """Score both halves of a pack that did not fit, and make smaller packs for a while."""
        self._num_fitted = 0
        alone = _singly(parts)
        if len(alone) == 1:
            request, seat = alone[0]
            yield (
                parts[0],
                DocumentTooLargeError(
                    f"{request.name_of(seat)} does not fit into memory even alone "
                    f"({request.num_tokens(replace(seat, num_cached=0))} tokens with its query). "
                    "Lower max_length, use a smaller dtype, or a device with more memory."
                ),
            )
            return
        half = sum(request.num_tokens(seat) for request, seats in parts for seat in seats) // 2
        if half < self.budget.max_batch_tokens:
            attention = self.budget.max_attention_tokens
            self.budget = replace(
                self.budget,
                max_batch_tokens=half,
                max_attention_tokens=None if attention is None else max(attention // 2, 1),
            )
            logger.warning("Memory ran out; packs hold at most %d tokens for a while.", half)
        middle = len(alone) // 2
        for side in (alone[:middle], alone[middle:]):
            yield from self.run(_regroup(side))

    def _grow(self) -> None:
        """Count a pack that fitted; make larger ones again after many."""
        self._num_fitted += 1
        if self._num_fitted < _PATIENCE or self.budget == self._most:
            return
        self._num_fitted = 0
        tokens, most = 2 * self.budget.max_batch_tokens, self._most
        if tokens >= most.max_batch_tokens:
            self.budget = most
            return
        attention = self.budget.max_attention_tokens
        self.budget = replace(
            self.budget,
            max_batch_tokens=tokens,
            max_attention_tokens=None if attention is None else 2 * attention,
        )

    def _corrected(self, parts: Sequence[Part], scored: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scores with those that are not finite computed again, once."""
        bad = np.flatnonzero(~np.isfinite(scored))
        if self._rescore is None or not len(bad):
            return scored
        logger.warning("Scores that were not finite are computed again: %d.", len(bad))
        alone = [(request, replace(seat, num_cached=0)) for request, seat in _singly(parts)]
        corrected = scored.copy()
        corrected[bad] = self._again(self._rescore, [alone[i] for i in bad])
        return corrected

    def _again(self, rescore: Score, alone: Sequence[tuple[Request, Seat]]) -> NDArray[np.float32]:
        """Return scores in higher precision, NaN where that fails, too."""
        scored = _try(rescore, _build(_regroup(alone), self._backend))
        if isinstance(scored, MemoryError) and len(alone) > 1:
            middle = len(alone) // 2
            halves = [self._again(rescore, side) for side in (alone[:middle], alone[middle:])]
            return np.concatenate(halves)
        if isinstance(scored, BaseException):
            logger.warning("Computing scores again failed: %s.", type(scored).__name__)
            for request, _ in alone:
                request.second_error = type(scored).__name__
            return np.full(len(alone), np.nan, np.float32)
        return scored


def _try(score: Score, pack: Pack) -> NDArray[np.float32] | BaseException:
    """Return the scores of a pack, or what went wrong.

    Knows no request, because the traceback of an error holds this frame.
    """
    try:
        scored = score(pack)
    except MemoryError:
        return MemoryError()  # another one: the traceback of the first keeps tensors alive
    except BaseException as error:
        return error
    if scored.shape != (len(pack.last_tokens),):
        return Qwen3RerankerError(
            f"the model returned scores of shape {scored.shape} for {len(pack.last_tokens)} "
            "documents; none are invented or dropped. Please report this."
        )
    return scored


def _build(parts: Sequence[Part], backend: str) -> Pack:
    """Lay out documents of several requests as one row."""
    seated = [(request.groups[seat.group], seat) for request, seats in parts for seat in seats]
    return build_pack(
        [group for group, _ in seated],
        [replace(seat, group=i) for i, (_, seat) in enumerate(seated)],
        backend=backend,
    )


def _singly(parts: Sequence[Part]) -> list[tuple[Request, Seat]]:
    """Return a seat for each document of a pack, in its order."""
    return [
        (request, replace(seat, documents=(d,)))
        for request, seats in parts
        for seat in seats
        for d in seat.documents
    ]


def _regroup(alone: Sequence[tuple[Request, Seat]]) -> list[Part]:
    """Join single seats of the same request and group again."""
    parts: list[Part] = []
    for request, seat in alone:
        if not parts or parts[-1][0] is not request:
            parts.append((request, []))
        seats = parts[-1][1]
        if seats and seats[-1].group == seat.group:
            seats[-1] = replace(seats[-1], documents=seats[-1].documents + seat.documents)
        else:
            seats.append(seat)
    return parts

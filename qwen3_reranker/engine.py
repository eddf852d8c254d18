"""One owner thread per model: callers queue, their documents share packs, one forward at a time.

Decides whose documents travel next, what becomes of a forward that fails, and whose scores they
are. Knows nothing of text, and of torch only that `score` may be called from a thread of its own.

Requests take turns by the tokens they have been served (fair queuing, Demers, Keshav and Shenker
1989): one that comes while a long job runs is seated first in the next pack, and the long job fills
the rest of it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from .errors import (
    ClosedError,
    DocumentTooLargeError,
    NonFiniteScoreError,
    OverloadedError,
    Qwen3RerankerError,
    ReentryError,
)
from .packing import Budget, Group, Line, Pack, Room, Seat, build_pack, merge_duplicates
from .score_cache import ScoreCache
from .tokenization import EncodedGroup

logger = logging.getLogger(__name__)

Score = Callable[[Pack], NDArray[np.float32]]
Progress = Callable[[int], object]
"""Called from the owner thread after each pack with the number of distinct documents in it."""

_FULL = 0.9
"""Share of the budget from which a pack is not searched for more."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What one request gets back.

    Attributes:
        log_odds: One float32 array per group, aligned with its documents.
        tokens: Tokens of its packs that the model computed; beginnings kept for many do not count.
    """

    log_odds: list[NDArray[np.float32]]
    tokens: int


@dataclass(frozen=True, slots=True)
class PackRecord:
    """What an observer is told after each forward.

    Attributes:
        requests: Calls whose documents were in the pack.
        documents: Distinct documents in it.
        tokens: Tokens in it.
        waiting: Calls that wait or are partly scored.
        wait_s: Longest time from a call's arrival to this forward, of calls new to the model.
        run_s: Seconds of the forward, failed tries included.
    """

    requests: int
    documents: int
    tokens: int
    waiting: int
    wait_s: float
    run_s: float


class ScoresFuture(Future[Scores]):
    """A request's result; abandoning it stops the work even between packs."""

    def __init__(self) -> None:
        super().__init__()
        self.abandoned = threading.Event()

    def abandon(self) -> None:
        """Drop the request if it waits, or after the forward in flight if it runs."""
        self.abandoned.set()
        self.cancel()


@dataclass(slots=True, eq=False)
class _Request:
    """A call as it waits: what came, and once it is admitted what is left of it."""

    encoded: Sequence[EncodedGroup]
    progress: Progress | None
    future: ScoresFuture = field(default_factory=ScoresFuture)
    arrived: float = field(default_factory=monotonic)
    served: float = 0.0  # virtual time: the least served are seated first
    tokens: int = 0
    is_new: bool = True
    all_groups: list[Group] = field(default_factory=list)
    places: list[list[tuple[int, int]]] = field(default_factory=list)
    log_odds: list[NDArray[np.float32]] = field(default_factory=list)
    unknown: list[NDArray[np.int64]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)  # of unknown documents
    line: Line = field(default_factory=lambda: Line([]))
    left: int = 0

    def index_of(self, group: int, document: int) -> str:
        """Return how a caller knows a distinct document."""
        wanted = (group, int(self.unknown[group][document]))
        return next(
            f"documents[{d}]" if len(self.places) == 1 else f"documents[{g}][{d}]"
            for g, row in enumerate(self.places)
            for d, place in enumerate(row)
            if place == wanted
        )


_Parts = list[tuple[_Request, list[Seat]]]


class Engine:
    """Scores requests, several to a pack.

    Args:
        score: Returns the log-odds of a pack, shape (documents,). May raise MemoryError.
        backend: Attention backend of the packs.
        budget: What a pack may hold; halved when memory runs out.
        rescore: Like `score` in higher precision, for documents whose score is not finite; all of
            their heads is in the row.
        max_cached_scores: Scores kept for prompts that come again; 0 keeps none.
        max_waiting: Requests that may wait; one more is refused.
    """

    def __init__(
        self,
        score: Score,
        *,
        backend: str,
        budget: Budget,
        rescore: Score | None = None,
        max_cached_scores: int = 0,
        max_waiting: int = 1024,
    ) -> None:
        self._score = score
        self._rescore = rescore
        self._backend = backend
        self._budget = budget
        self._known = ScoreCache(max_cached_scores) if max_cached_scores else None
        # Its put is reentrant, so that `stop` may run in a finaliser, in whatever thread and
        # wherever the garbage collector happens to call it.
        self._waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._active: list[_Request] = []  # in order of arrival; the owner's alone
        self._clock = 0.0  # virtual time: tokens served to each of those who wait, if all shared
        self._max_waiting = max_waiting
        self._observers: list[Callable[[PackRecord], object]] = []
        self._is_closed = False
        self._owner = threading.Thread(target=self._run, name="qwen3-reranker", daemon=True)
        self._owner.start()
        _loaded_in.add(os.getpid())
        _engines.add(self)
        _owners.add(self._owner)

    def submit(
        self, groups: Sequence[EncodedGroup], *, progress: Progress | None = None
    ) -> ScoresFuture:
        """Queue groups for scoring.

        Raises:
            OverloadedError: If too many requests wait already.
            ClosedError: If the engine is closed, or the process was forked after it was made.
            ReentryError: If the caller is this engine's own thread, which would wait for itself.
        """
        refuse_fork()
        if threading.current_thread() is self._owner:
            raise ReentryError(
                "the reranker was called from a callback of its own scoring thread, which would "
                "wait for itself. Call it from another thread."
            )
        if self._waiting.qsize() + len(self._active) > self._max_waiting:
            raise OverloadedError(
                f"{self._max_waiting} calls wait already. Try again later, or send fewer at a time."
            )
        request = _Request(groups, progress)
        if not self._is_closed:
            self._waiting.put(request)
        # Closed meanwhile: the owner may have gone without it.
        if self._is_closed and request.future.cancel():
            raise ClosedError("the reranker is closed. Make a new one.")
        return request.future

    def observe(self, observer: Callable[[PackRecord], object]) -> None:
        """Call this after every forward, from the owner thread; it must be quick."""
        self._observers.append(observer)

    def stop(self) -> None:
        """Fail what waits and let the thread end after the forward in flight, unawaited."""
        self._is_closed = True
        self._fail_waiting()
        self._waiting.put(None)

    def close(self) -> None:
        """Stop the thread and wait for its end; requests not yet scored fail."""
        self.stop()
        if threading.current_thread() is not self._owner:
            self._owner.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            try:
                is_open = self._admit()
                if is_open:
                    self._serve_pack()
            except BaseException as error:  # a fault of this file: nobody may wait for ever
                for request in list(self._active):
                    self._fail(request, error)
        for request in self._active:
            request.future.set_exception(
                ClosedError("the reranker was closed while this call was scored.")
            )
        self._active.clear()
        self._fail_waiting()

    def _fail_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._waiting.get_nowait()
                if request is not None and request.future.set_running_or_notify_cancel():
                    request.future.set_exception(
                        ClosedError("the reranker was closed while this call waited.")
                    )

    def _admit(self) -> bool:
        """Take in all that waits, waiting if there is nothing to do; return False to stop."""
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._waiting.get(block=not self._active)
                if request is None:
                    return False
                if self._is_closed:
                    self._waiting.put(request)
                    return False
                if request.future.set_running_or_notify_cancel():
                    self._active.append(request)
                    self._begin(request)
                del request  # or an idle owner would hold the last one
        return not self._is_closed

    def _begin(self, request: _Request) -> None:
        """Find out what there is to do for a request."""
        request.all_groups, request.places = merge_duplicates(request.encoded)
        request.log_odds = [self._recall(group) for group in request.all_groups]
        request.unknown = [np.flatnonzero(np.isnan(row)) for row in request.log_odds]
        request.groups = [
            Group(group.head, [group.documents[d] for d in missing], group.num_shared)
            for group, missing in zip(request.all_groups, request.unknown, strict=True)
        ]
        request.line = Line(request.groups)
        request.left = sum(map(len, request.unknown))
        request.served = self._clock
        num_known = sum(len(group.documents) for group in request.all_groups) - request.left
        self._advance(request, num_known)

    def _recall(self, group: Group) -> NDArray[np.float32]:
        """Return the log-odds known of each document, NaN for the others."""
        row = np.full(len(group.documents), np.nan, np.float32)
        if self._known is not None:
            for d, document in enumerate(group.documents):
                value = self._known.find(ScoreCache.key(group.head, document))
                row[d] = np.nan if value is None else value
        return row

    def _serve_pack(self) -> None:
        parts = self._compose()
        if not parts:
            return
        new = [request for request, _ in parts if request.is_new]
        for request in new:
            request.is_new = False
        started = monotonic()
        record = PackRecord(
            requests=len(parts),
            documents=sum(len(seat.documents) for _, seats in parts for seat in seats),
            tokens=sum(_num_tokens(request, seat) for request, seats in parts for seat in seats),
            waiting=self._waiting.qsize() + len(self._active),
            wait_s=max((started - request.arrived for request in new), default=0.0),
            run_s=0.0,
        )
        self._score_parts(parts)
        if self._observers:
            self._tell(replace(record, run_s=monotonic() - started))

    def _compose(self) -> _Parts:
        """Fill a pack with the documents of whoever was served least."""
        for request in [r for r in self._active if r.future.abandoned.is_set()]:
            self._fail(request, CancelledError())
        room, parts = Room(self._budget), []
        for request in sorted(self._active, key=lambda r: (r.served, not r.is_new)):
            if room.linear > _FULL * self._budget.max_batch_tokens:
                break
            before = room.linear
            seats = request.line.fill(room)
            if seats:
                parts.append((request, seats))
                request.served += room.linear - before
        # What each would have been served by now, had they shared: where newcomers begin, so that
        # neither they nor a stream of them have the model to themselves.
        self._clock += room.linear / max(len(self._active), 1)
        return parts

    def _score_parts(self, parts: _Parts) -> None:
        """Score a pack, and on failure its halves or its requests one by one."""
        parts = [part for part in parts if part[0] in self._active]  # others have failed meanwhile
        if not parts:
            return
        scored, error = _try(self._score, _build(parts, self._backend))
        if scored is not None:
            self._deliver(parts, scored)
        elif isinstance(error, MemoryError):
            self._halve(parts)
        elif len(parts) > 1:  # one bad document must fail its own caller alone
            for part in parts:
                self._score_parts([part])
        elif error is not None:
            self._fail(parts[0][0], error)
        del error  # its traceback leads back to this frame: no cycle, so it is freed at once

    def _halve(self, parts: _Parts) -> None:
        """Score both halves of a pack that did not fit, and make smaller packs from now on."""
        alone = _singly(parts)
        if len(alone) == 1:
            request, seat = alone[0]
            self._fail(request, DocumentTooLargeError(
                f"{request.index_of(seat.group, seat.documents[0])} does not fit into memory even "
                f"alone ({_num_tokens(request, seat)} tokens with its query). Lower max_length, "
                "use a smaller dtype, or a device with more memory."
            ))  # fmt: skip
            return
        half = sum(_num_tokens(request, seat) for request, row in parts for seat in row) // 2
        if half < self._budget.max_batch_tokens:
            attention = self._budget.max_attention_tokens
            self._budget = replace(
                self._budget,
                max_batch_tokens=half,
                max_attention_tokens=None if attention is None else max(attention // 2, 1),
            )
            logger.warning("Memory ran out; packs hold at most %d tokens from now on.", half)
        middle = len(alone) // 2
        for side in (alone[:middle], alone[middle:]):
            self._score_parts(_regroup(side))

    def _deliver(self, parts: _Parts, scored: NDArray[np.float32]) -> None:
        if self._rescore is not None and not np.isfinite(scored).all():
            scored = self._corrected(parts, scored)
        start = 0
        for request, seats in parts:
            count = 0
            for seat in seats:
                stop = start + len(seat.documents)
                row = request.unknown[seat.group][list(seat.documents)]
                request.log_odds[seat.group][row] = scored[start:stop]
                count += len(seat.documents)
                request.tokens += _num_tokens(request, seat)
                start = stop
            request.left -= count
            self._advance(request, count)

    def _corrected(self, parts: _Parts, scored: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scores with those that are not finite computed again, once."""
        alone = [(request, replace(seat, num_cached=0)) for request, seat in _singly(parts)]
        bad = np.flatnonzero(~np.isfinite(scored))
        logger.warning("Scores that were not finite are computed again: %d.", len(bad))
        assert self._rescore is not None  # noqa: S101
        pack = _build(_regroup([alone[i] for i in bad]), self._backend)
        again, _ = _try(self._rescore, pack)
        corrected = scored.copy()
        if again is not None:
            corrected[bad] = again
        return corrected

    def _advance(self, request: _Request, num_documents: int) -> None:
        """Report progress, and end the request if nothing is left."""
        if request not in self._active:  # it failed in another part of the pack
            return
        try:
            if request.progress is not None and num_documents:
                request.progress(num_documents)
            if request.left:
                return
            aligned = [
                np.array([request.log_odds[g][d] for g, d in row], np.float32)
                for row in request.places
            ]
            _refuse_non_finite(aligned)
        except BaseException as error:
            self._fail(request, error)
            return
        if self._known is not None:
            for group, row in zip(request.all_groups, request.log_odds, strict=True):
                for document, value in zip(group.documents, row.tolist(), strict=True):
                    self._known.keep(ScoreCache.key(group.head, document), value)
        self._active.remove(request)
        request.future.set_result(Scores(aligned, request.tokens))

    def _fail(self, request: _Request, error: BaseException) -> None:
        if request in self._active:
            self._active.remove(request)
            request.future.set_exception(error)
            # The error's traceback leads to frames that hold the request: without the future there
            # is no cycle, and what a failed forward left behind is freed at once.
            request.future = ScoresFuture()

    def _tell(self, record: PackRecord) -> None:
        for observer in self._observers:
            try:
                observer(record)
            except Exception as error:
                logger.warning("An observer of the reranker raised %s.", type(error).__name__)


def _build(parts: _Parts, backend: str) -> Pack:
    """Lay out documents of several requests as one row."""
    seated = [(request.groups[seat.group], seat) for request, seats in parts for seat in seats]
    return build_pack(
        [group for group, _ in seated],
        [replace(seat, group=i) for i, (_, seat) in enumerate(seated)],
        backend=backend,
    )


def _try(score: Score, pack: Pack) -> tuple[NDArray[np.float32] | None, BaseException | None]:
    """Return the scores of a pack, or what went wrong.

    Knows no request, because the traceback of an error holds this frame.
    """
    try:
        scored = score(pack)
    except MemoryError:
        return None, MemoryError()  # another one: the traceback of the first keeps tensors alive
    except BaseException as error:
        return None, error
    if scored.shape != (len(pack.last_tokens),):
        return None, Qwen3RerankerError(
            f"the model returned scores of shape {scored.shape} for {len(pack.last_tokens)} "
            "documents; none are invented or dropped. Please report this."
        )
    return scored, None


def _num_tokens(request: _Request, seat: Seat) -> int:
    group = request.groups[seat.group]
    head = len(group.head) - seat.num_cached
    return head + sum(len(group.documents[d]) for d in seat.documents)


def _singly(parts: _Parts) -> list[tuple[_Request, Seat]]:
    """Return a seat for each document of a pack, in its order."""
    return [
        (request, replace(seat, documents=(d,)))
        for request, seats in parts
        for seat in seats
        for d in seat.documents
    ]


def _regroup(alone: Sequence[tuple[_Request, Seat]]) -> _Parts:
    """Join single seats of the same request and group again."""
    parts: _Parts = []
    for request, seat in alone:
        if not parts or parts[-1][0] is not request:
            parts.append((request, []))
        seats = parts[-1][1]
        if seats and seats[-1].group == seat.group:
            seats[-1] = replace(seats[-1], documents=seats[-1].documents + seat.documents)
        else:
            seats.append(seat)
    return parts


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_owners: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_loaded_in: set[int] = set()
"""Ids of the processes in which an engine was made; a fork copies them."""


@atexit.register
def _await_owners() -> None:
    # The owner may hold the last reference to the weights. A thread that frees tensors while the
    # interpreter shuts down aborts the process.
    try:
        for engine in list(_engines):
            engine.stop()
        for owner in list(_owners):
            owner.join()
    except KeyboardInterrupt:  # not even the forward in flight is to be waited for
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(130)


def refuse_fork() -> None:
    """Refuse to score in a child process of one that has loaded a model.

    Raises:
        ClosedError: If this process was forked after a model was loaded.
    """
    if _loaded_in and os.getpid() not in _loaded_in:
        raise ClosedError(
            "a model was loaded before this process was forked from its parent; torch's threads "
            "do not exist here and a forward would hang. Load no model before the fork, or start "
            "processes by spawn."
        )


def _refuse_non_finite(log_odds: Sequence[NDArray[np.float32]]) -> None:
    bad = [
        f"documents[{d}]" if len(log_odds) == 1 else f"documents[{g}][{d}]"
        for g, row in enumerate(log_odds)
        for d in np.flatnonzero(~np.isfinite(row))
    ]
    if bad:
        raise NonFiniteScoreError(
            f"the model returned NaN or infinity for {len(bad)} documents, the first is {bad[0]}; "
            "float16 overflows in these decoders. Use dtype='bfloat16' or 'float32'."
        )

"""One owner thread per model: callers queue, their documents share packs, one forward at a time.

Decides whose documents travel next and who may wait. Knows nothing of text, nothing of how a
forward that fails is mended, and of torch only that `score` may be called from a thread of its own.

Requests take turns by the tokens they will have been served with their next pack (fair queuing,
Demers, Keshav and Shenker 1989): a short one that comes while long jobs run, or just after them, is
seated first in the next pack, and a long job fills the rest of it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from time import monotonic

from ..call.futures import LockFreeFuture
from ..errors import ClosedError, OverloadedError, ReentryError
from ..text.steps import Done, Steps
from ..text.tokenizer import EncodedGroup
from .forwards import Forwards, Part, Score
from .packing import Budget, Room
from .request import Name, Progress, Request, ScoresFuture, place_of
from .score_cache import ScoreCache
from .threads import refuse_fork, start
from .turns import Turns

logger = logging.getLogger(__name__)

_FULL = 0.9
"""Share of the budget from which a pack is not searched for more."""


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


class Engine:
    """Scores requests, several to a pack.

    Args:
        score: Returns the log-odds of a pack, shape (documents,). May raise MemoryError.
        backend: Attention backend of the packs.
        budget: What a pack may hold; halved when memory runs out.
        rescore: Like `score` in higher precision, for documents whose score is not finite; all of
            their heads is in the row.
        max_cached_scores: Scores kept for prompts that come again; 0 keeps none.
        max_waiting: Calls that may wait, to be encoded or scored; one more is refused.

    Attributes:
        turns: Does the encoding; ends with the engine.
        thread: The owner.
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
        self._forwards = Forwards(score, rescore, backend=backend, budget=budget)
        self._known = ScoreCache(max_cached_scores) if max_cached_scores else None
        # Its put is reentrant, so that `stop` may run in a finaliser, in whatever thread and
        # wherever the garbage collector happens to call it.
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._active: list[Request] = []  # in order of arrival; the owner's alone
        # Virtual time: tokens that each would have been served by now, had all shared. There
        # newcomers begin, so that neither they nor a stream of them have the model to themselves.
        self._clock = 0.0
        self._max_waiting = max_waiting
        self._observers: list[Callable[[PackRecord], object]] = []
        self._is_closed = False
        self.turns = Turns()
        self.thread = threading.Thread(target=self._run, name="qwen3-reranker", daemon=True)
        start(self)

    def submit(
        self,
        groups: Sequence[EncodedGroup],
        *,
        name: Name = place_of,
        progress: Progress | None = None,
        on_done: Callable[[], object] | None = None,
    ) -> ScoresFuture:
        """Queue groups for scoring.

        Args:
            groups: Heads and documents.
            name: How errors call a document.
            progress: Told of scored documents.
            on_done: Called once there is a result or an error, by whichever thread makes it.

        Raises:
            OverloadedError: If too many requests wait already.
            ClosedError: If the engine is closed, or the process was forked after it was made.
            ReentryError: If the caller is this engine's own thread, which would wait for itself.
        """
        self.refuse_reentry()
        self._refuse_more_than(self._waiting.qsize() + len(self._active))
        request = Request(groups, progress, LockFreeFuture(on_done), name=name)
        future = request.future  # the request lets go of it at its end
        if not self._is_closed:
            self._waiting.put(request)
        # Closed meanwhile: the owner may have gone without it.
        closed = ClosedError("the reranker is closed. Make a new one.")
        if self._is_closed and future.set_exception(closed):
            raise closed
        return future

    def encode(
        self, steps: Steps[Done], on_done: Callable[[], object] | None = None
    ) -> LockFreeFuture[Done]:
        """Queue the work by which a call gets its groups.

        Args:
            steps: The work.
            on_done: As in `submit`.

        Raises:
            OverloadedError: As `submit`; here before anything is done for the call.
            ClosedError: As `submit`.
            ReentryError: As `submit`.
        """
        self.refuse_reentry()
        waiting = self.turns.num_waiting + self._waiting.qsize() + len(self._active)
        self._refuse_more_than(waiting)
        return self.turns.submit(steps, on_done)

    def _refuse_more_than(self, num_waiting: int) -> None:
        if num_waiting > self._max_waiting:
            raise OverloadedError(
                f"{self._max_waiting} calls wait already. Try again later, or send fewer at a time."
            )

    def refuse_reentry(self) -> None:
        """Refuse a caller who would wait for ever.

        Raises:
            ClosedError: If the process was forked after the engine was made.
            ReentryError: If the caller is this engine's own thread, which would wait for itself.
        """
        refuse_fork()
        if threading.current_thread() is self.thread:
            raise ReentryError(
                "the reranker was called from a callback of its own scoring thread, which would "
                "wait for itself. Call it from another thread."
            )

    def observe(self, observer: Callable[[PackRecord], object]) -> None:
        """Call this after every forward, from the owner thread; it must be quick."""
        self._observers.append(observer)

    def stop(self) -> None:
        """Fail what waits and let the thread end after the forward in flight, unawaited."""
        self._is_closed = True
        self.turns.stop()
        self._fail_waiting()
        self._waiting.put(None)

    def close(self) -> None:
        """Stop the thread and wait for its end; requests not yet scored fail."""
        self.stop()
        if threading.current_thread() is not self.thread:
            self.thread.join()
            self.turns.thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            try:
                is_open = self._admit()
                if is_open:
                    self._serve_pack()
            except BaseException as error:  # a fault of this file: nobody may wait for ever
                self._fail_active(error)
        for request in self._active:
            request.future.set_exception(
                ClosedError("the reranker was closed while this call was scored. Make a new one.")
            )
        self._active.clear()
        self._fail_waiting()

    def _fail_active(self, error: BaseException) -> None:
        """Fail all that is served; a frame of its own, or an idle owner would hold the last one."""
        for request in list(self._active):
            self._fail(request, error)

    def _fail_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._waiting.get_nowait()
                if request is not None:
                    request.future.set_exception(
                        ClosedError(
                            "the reranker was closed while this call waited. Make a new one."
                        )
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
                if not request.future.is_abandoned:
                    self._active.append(request)
                    request.served = self._clock
                    self._advance(request, request.begin(self._known))
                del request  # or an idle owner would hold the last one
        return not self._is_closed

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
            tokens=sum(request.num_tokens(seat) for request, seats in parts for seat in seats),
            waiting=self._waiting.qsize() + len(self._active),
            wait_s=max((started - request.arrived for request in new), default=0.0),
            run_s=0.0,
        )
        for (request, seats), outcome in self._forwards.run(parts):
            if isinstance(outcome, BaseException):
                self._fail(request, outcome)
            else:
                self._advance(request, request.take(seats, outcome))
            del outcome  # an error's traceback leads back to this frame
        if self._observers:
            self._tell(replace(record, run_s=monotonic() - started))

    def _compose(self) -> list[Part]:
        """Fill a pack with the documents of whoever will have been served least."""
        for request in [r for r in self._active if r.future.is_abandoned]:
            self._fail(request, CancelledError())
        room, parts, ended = Room(self._forwards.budget), [], []
        most = room.budget.max_batch_tokens
        for request in sorted(self._active, key=lambda r: (r.served_after(most), not r.is_new)):
            if room.linear > _FULL * most:
                break
            before = room.linear
            seats = request.line.fill(room)
            if seats:
                parts.append((request, seats))
                request.serve(room.linear - before)
                if not request.line:
                    ended.append(room.linear - before)
        if parts:
            self._clock += equal_share(room.linear, len(self._active), ended)
        return parts

    def _advance(self, request: Request, num_documents: int) -> None:
        """Report progress, and end the request if nothing is left."""
        try:
            if request.progress is not None and num_documents:
                request.progress(num_documents)
            if request.left:
                return
            scores = request.scores()
        except BaseException as error:
            self._fail(request, error)
            return
        if self._known is not None:
            for key, log_odds in request.distinct():
                self._known.keep(key, log_odds)
        self._end(request)
        request.future.set_result(scores)

    def _fail(self, request: Request, error: BaseException) -> None:
        self._end(request)
        request.future.set_exception(error)
        # The error's traceback leads to frames that hold the request: without the future there is
        # no cycle, and what a failed forward left behind is freed at once.
        request.future = LockFreeFuture()

    def _end(self, request: Request) -> None:
        request.is_over = True
        self._active.remove(request)

    def _tell(self, record: PackRecord) -> None:
        for observer in self._observers:
            try:
                observer(record)
            except BaseException as error:  # SystemExit, too, is no other caller's business
                logger.warning("An observer of the reranker raised %s.", type(error).__name__)


def equal_share(tokens: int, num_requests: int, ended: Sequence[int]) -> float:
    """Return what each request would have of a pack if all shared; who needs less leaves the rest.

    Args:
        tokens: Tokens of the pack.
        num_requests: Requests that wait for it; at least one.
        ended: Tokens of each request that needs no more.

    Example:
        >>> equal_share(100, 3, []), equal_share(100, 3, [10]), equal_share(100, 2, [100])
        (33.333333333333336, 45.0, 50.0)
    """
    left, sharing = float(tokens), num_requests
    for need in sorted(ended):
        if need * sharing >= left:
            break
        left -= need
        sharing -= 1
    return left / sharing

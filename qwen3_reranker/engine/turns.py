"""One thread that does calls' work in steps, in the order in which equal shares would end them.

Decides whose step is next. Knows nothing of what a step does but its cost.

Calls take turns by what they have had with their next step (fair queuing, Demers, Keshav and
Shenker 1989), as they do for packs: two short documents that come while a million are encoded, or
just after them, wait for one step of those.
"""

from __future__ import annotations

import contextlib
import heapq
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..call.futures import LockFreeFuture
from ..errors import ClosedError
from ..text.steps import Steps
from .threads import start

Done = TypeVar("Done")


@dataclass(slots=True, order=True)
class _Work:
    """Steps, and where their result goes; sorts by who is next."""

    steps: Steps[Any] = field(compare=False)
    future: LockFreeFuture[Any] = field(compare=False)
    due: float = 0.0  # the fair share of cost that it has had after its next step
    place: int = 0  # of those who are due at once the newest is first: it may be short
    cost: int = field(default=0, compare=False)  # of the next step; to hear the first's is free


class Turns:
    """Does work in steps; callers wait for its results.

    Attributes:
        thread: Does all steps.
    """

    def __init__(self) -> None:
        self._coming: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._active: list[_Work] = []  # a heap, and the thread's alone
        self._admitted = self._unswept = 0
        self._clock = 0.0  # cost each would have been served by now, had all shared equally
        self._is_closed = False
        self.thread = threading.Thread(target=self._run, name="qwen3-reranker-encode", daemon=True)
        start(self)

    @property
    def num_waiting(self) -> int:
        """How many have come and have no result yet."""
        return self._coming.qsize() + len(self._active)

    def submit(
        self, steps: Steps[Done], on_done: Callable[[], object] | None = None
    ) -> LockFreeFuture[Done]:
        """Queue work.

        Args:
            steps: The work.
            on_done: Called once there is a result or an error, by whichever thread makes it.

        Raises:
            ClosedError: If nothing is done here any more.
        """
        work = _Work(steps, LockFreeFuture(on_done))
        future = work.future
        if not self._is_closed:
            self._coming.put(work)
        closed = ClosedError("the reranker is closed. Make a new one.")
        if self._is_closed and future.set_exception(closed):  # the thread may have gone without it
            raise closed
        return future

    def stop(self) -> None:
        """Fail what waits and let the thread end after the step in hand, unawaited."""
        self._is_closed = True
        self._fail_coming()
        self._coming.put(None)

    def _run(self) -> None:
        while not self._is_closed:
            self._admit()
            self._do_step()
        for work in self._active:
            _fail_closed(work)
        self._active.clear()
        self._fail_coming()

    def _admit(self) -> None:
        """Take in all that has come, waiting if there is nothing to do."""
        with contextlib.suppress(queue.Empty):
            while not self._is_closed:
                work = self._coming.get(block=not self._active)
                if work is not None:
                    self._admitted += 1
                    work.due, work.place = self._clock, -self._admitted
                    heapq.heappush(self._active, work)
                del work  # or an idle thread would hold the last one

    def _do_step(self) -> None:
        """Do a step of whoever has had least after it."""
        self._drop_abandoned()
        if not self._active or self._is_closed:
            return
        work = self._active[0]
        self._clock += work.cost / len(self._active)
        try:
            work.cost = next(work.steps)
        except StopIteration as end:
            _end(heapq.heappop(self._active), end.value)
        except BaseException as error:
            _end(heapq.heappop(self._active), error=error)
        else:
            work.due += work.cost
            heapq.heapreplace(self._active, work)

    def _drop_abandoned(self) -> None:
        """Let go of work whose caller has left: when it is next, or once in as many steps as wait.

        To look at all of a crowd at every step would take longer than the steps.
        """
        while self._active and self._active[0].future.is_abandoned:
            _end(heapq.heappop(self._active), error=CancelledError())
        self._unswept += 1
        if self._unswept >= len(self._active):
            self._unswept = 0
            left: list[_Work] = []
            kept: list[_Work] = []
            for work in self._active:
                (left if work.future.is_abandoned else kept).append(work)
            heapq.heapify(kept)
            self._active = kept
            for work in left:
                _end(work, error=CancelledError())

    def _fail_coming(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                work = self._coming.get_nowait()
                if work is not None:
                    _fail_closed(work)


def _end(work: _Work, result: object = None, error: BaseException | None = None) -> None:
    # An error's traceback leads to frames that hold the work: without its future there is no
    # cycle, and what it leaves behind is freed at once.
    future, work.future = work.future, LockFreeFuture()
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _fail_closed(work: _Work) -> None:
    work.future.set_exception(
        ClosedError("the reranker was closed while this call waited. Make a new one.")
    )

"""One thread that does calls' work in steps, in the order in which equal shares would end them.

Decides whose step is next. Knows nothing of what a step does but its cost.

Calls take turns by what they have had with their next step (fair queuing, Demers, Keshav and
Shenker 1989), as they do for packs: two short documents that come while a million are encoded, or
just after them, wait for one step of those.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import ClosedError
from .futures import LockFreeFuture
from .owners import start
from .steps import Steps

Done = TypeVar("Done")


@dataclass(slots=True, eq=False)
class _Work:
    """Steps, where their result goes, the fair share of cost they have had, and the next cost."""

    steps: Steps[Any]
    future: LockFreeFuture[Any]
    served: float = 0.0
    cost: int = 0  # to hear the first step's costs nothing


class Turns:
    """Does work in steps; callers wait for its results.

    Attributes:
        thread: Does all steps.
    """

    def __init__(self) -> None:
        self._coming: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._active: list[_Work] = []  # the thread's alone
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
                    work.served = self._clock
                    self._active.append(work)
                del work  # or an idle thread would hold the last one

    def _do_step(self) -> None:
        """Do a step of whoever has had least after it; of those who came last, if several."""
        for work in [work for work in self._active if work.future.is_abandoned]:
            self._end(work, error=CancelledError())
        if not self._active or self._is_closed:
            return
        work = min(reversed(self._active), key=lambda work: work.served + work.cost)
        work.served += work.cost
        self._clock += work.cost / len(self._active)
        try:
            work.cost = next(work.steps)
        except StopIteration as end:
            self._end(work, end.value)
            return
        except BaseException as error:
            self._end(work, error=error)

    def _end(self, work: _Work, result: object = None, error: BaseException | None = None) -> None:
        self._active.remove(work)
        # An error's traceback leads to frames that hold the work: without its future there is no
        # cycle, and what it leaves behind is freed at once.
        future, work.future = work.future, LockFreeFuture()
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _fail_coming(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                work = self._coming.get_nowait()
                if work is not None:
                    _fail_closed(work)


def _fail_closed(work: _Work) -> None:
    work.future.set_exception(ClosedError("the reranker was closed while this call waited."))

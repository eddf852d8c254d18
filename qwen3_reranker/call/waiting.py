"""How a caller waits: beside a bar, on an event loop, until a deadline.

Decides what is shown meanwhile, and that a caller who gives up leaves no work behind. Knows nothing
of texts and models. Nothing here holds a lock that another thread wants, so that an interrupt may
land anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeAlias, TypeVar

from tqdm import tqdm

from ..engine.engine import Engine
from ..errors import TimedOutError
from .futures import LockFreeFuture
from .job import EncodedJob, Job
from ..engine.request import Scores

_PROGRESS_AFTER_S = 2.0

Result = TypeVar("Result")
Submit: TypeAlias = Callable[[Callable[[], object] | None], LockFreeFuture[Result]]
"""Queues work, given what is to be called at its end."""


def wait(engine: Engine, encoded: EncodedJob, job: Job) -> Scores:
    """Have a job scored and wait for it; a bar shows on a terminal if that takes long.

    Raises:
        Qwen3RerankerError: As `Reranker.rank`.
    """
    name = partial(encoded.name, job)
    if not _is_watched():
        return wait_until(job, lambda _: engine.submit(encoded.groups, name=name))
    # The bar is this thread's alone: it has locks, which the owner must never wait for.
    steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    future = engine.submit(
        encoded.groups, name=name, progress=steps.put, on_done=lambda: steps.put(None)
    )
    try:
        with tqdm(
            total=sum(len(group.documents) for group in encoded.groups), unit=" documents",
            desc="Reranking",
            delay=_PROGRESS_AFTER_S, leave=False,
        ) as bar:  # fmt: skip
            while (step := steps.get(timeout=job.seconds_left())) is not None:
                bar.update(step)
        return future.result()
    except queue.Empty as error:
        raise _late(job) from error
    finally:
        future.abandon()
        del future


def wait_until(job: Job, submit: Submit[Result]) -> Result:
    """Have something of a job done and wait for it until the job's deadline.

    Raises:
        TimedOutError: If it comes first; what is left of the work is dropped.
    """
    future = submit(None)
    try:
        return future.result(job.seconds_left())
    except TimeoutError as error:
        if future.done() and error is future.exception():  # the work's own, not the clock's
            raise
        raise _late(job) from error
    finally:
        future.abandon()  # KeyboardInterrupt, too, must not leave work behind
        del future  # or an error's traceback would lead back to it


async def await_scores(engine: Engine, encoded: EncodedJob, job: Job) -> Scores:
    """Have a job scored and leave the event loop free meanwhile.

    Raises:
        Qwen3RerankerError: As `Reranker.rank`.
    """
    name = partial(encoded.name, job)
    return await await_until(
        job, lambda on_done: engine.submit(encoded.groups, name=name, on_done=on_done)
    )


async def await_until(job: Job, submit: Submit[Result]) -> Result:
    """Do what `wait_until` does, and leave the event loop free meanwhile.

    Raises:
        TimedOutError: As `wait_until`.
    """
    loop = asyncio.get_running_loop()
    woken = loop.create_future()

    def wake() -> None:  # called once, from another thread
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(woken.set_result, None)

    future = submit(wake)
    try:
        # Not wait_for: its TimeoutError would have to be told from the work's own, and uvloop's
        # timers come half a millisecond early.
        await asyncio.wait({woken}, timeout=job.seconds_left())
        if not future.done():
            raise _late(job)
        return future.result()
    finally:
        future.abandon()
        del future


def _late(job: Job) -> TimedOutError:
    return TimedOutError(
        f"the {job.num_documents} documents were not scored within timeout_s; what was left was "
        "dropped. Allow more time, or send fewer."
    )


def _is_watched() -> bool:
    # Services run without stderr, where a bar would raise in the thread that scores.
    return sys.stderr is not None and sys.stderr.isatty()

"""How a caller waits: in its thread or on its event loop, until a deadline.

Decides that a caller who gives up leaves no work behind. Knows nothing of texts and models.
Nothing here holds a lock that another thread wants, so that an interrupt may land anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from ..errors import TimedOutError
from .futures import LockFreeFuture
from .job import Job

Result = TypeVar("Result")
Submit: TypeAlias = Callable[[Callable[[], object] | None], LockFreeFuture[Result]]
"""Queues work, given what is to be called at its end."""


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
        raise late(job) from error
    finally:
        future.abandon()  # KeyboardInterrupt, too, must not leave work behind
        del future  # or an error's traceback would lead back to it


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
            raise late(job)
        return future.result()
    finally:
        future.abandon()
        del future


def late(job: Job) -> TimedOutError:
    """Return the error of a call whose deadline has passed."""
    return TimedOutError(
        f"the {job.num_documents} documents were not scored within timeout_s; what was left was "
        "dropped. Allow more time, or send fewer."
    )

"""How a caller waits for scores: beside a bar, on an event loop, until a deadline.

Decides what is shown meanwhile, and that a caller who gives up leaves no work behind. Knows nothing
of texts and models.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial

from tqdm import tqdm

from .engine import Engine
from .errors import TimedOutError
from .jobs import EncodedJob, Job
from .request import Scores, ScoresFuture

_PROGRESS_AFTER_S = 2.0


def wait(engine: Engine, encoded: EncodedJob, job: Job) -> Scores:
    """Have a job scored and wait for it; a bar shows on a terminal if that takes long.

    Raises:
        Qwen3RerankerError: As `Reranker.rank`.
    """
    name = partial(encoded.name, job)
    if not _is_watched():
        return _result(engine.submit(encoded.groups, name=name), job)
    with tqdm(
        total=sum(len(group.documents) for group in encoded.groups), unit=" documents",
        desc="Reranking",
        delay=_PROGRESS_AFTER_S, leave=False,
    ) as bar:  # fmt: skip
        return _result(engine.submit(encoded.groups, name=name, progress=bar.update), job)


async def await_scores(engine: Engine, encoded: EncodedJob, job: Job) -> Scores:
    """Have a job scored and leave the event loop free meanwhile.

    Raises:
        Qwen3RerankerError: As `Reranker.rank`.
    """
    future = engine.submit(encoded.groups, name=partial(encoded.name, job))
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), job.seconds_left())
    except BaseException as error:
        future.abandon()
        _raise_if_late(error, job)
        raise


def _result(future: ScoresFuture, job: Job) -> Scores:
    try:
        return future.result(job.seconds_left())
    except BaseException as error:  # KeyboardInterrupt, too, must not leave work behind
        future.abandon()
        _raise_if_late(error, job)
        raise


def _raise_if_late(error: BaseException, job: Job) -> None:
    """Tell a call that took too long by a name of our own."""
    if type(error) is TimeoutError and job.seconds_left() == 0:
        raise TimedOutError(
            f"the {job.num_documents} documents were not scored within timeout_s; what was left "
            "was dropped. Allow more time, or send fewer."
        ) from error


def _is_watched() -> bool:
    # Services run without stderr, where a bar would raise in the thread that scores.
    return sys.stderr is not None and sys.stderr.isatty()

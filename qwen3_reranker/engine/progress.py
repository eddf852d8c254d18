"""How a caller waits for an engine: beside a bar, or on an event loop.

Decides what is shown meanwhile. Knows nothing of texts and models.
"""

from __future__ import annotations

import queue
import sys
from functools import partial

from tqdm import tqdm

from ..call.encoding import EncodedJob
from ..call.job import Job
from ..call.waiting import await_until, late, wait_until
from .engine import Engine
from .request import Scores

_PROGRESS_AFTER_S = 2.0


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
        raise late(job) from error
    finally:
        future.abandon()
        del future


async def await_scores(engine: Engine, encoded: EncodedJob, job: Job) -> Scores:
    """Have a job scored and leave the event loop free meanwhile.

    Raises:
        Qwen3RerankerError: As `Reranker.rank`.
    """
    name = partial(encoded.name, job)
    return await await_until(
        job, lambda on_done: engine.submit(encoded.groups, name=name, on_done=on_done)
    )


def _is_watched() -> bool:
    # Services run without stderr, where a bar would raise in the thread that scores.
    return sys.stderr is not None and sys.stderr.isatty()

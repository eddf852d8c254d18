"""One owner thread per model: callers queue, one forward runs at a time.

Decides when packs run and whose scores they are. Knows nothing of text, and of torch only that
`score` may be called from a thread of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .errors import ClosedError, NonFiniteScoreError, OverloadedError, Qwen3RerankerError
from .packing import Group, Pack, build_pack, merge_duplicates, plan_packs
from .score_cache import ScoreCache
from .tokenization import EncodedGroup

Progress = Callable[[int], object]
"""Called from the owner thread after each pack with the number of distinct documents in it."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What one request gets back.

    Attributes:
        log_odds: One float32 array per group, aligned with its documents.
        tokens: Tokens of the packs the model computed; beginnings kept for many are not counted.
    """

    log_odds: list[NDArray[np.float32]]
    tokens: int


class ScoresFuture(Future[Scores]):
    """A request's result; abandoning it stops the work even between packs."""

    def __init__(self) -> None:
        super().__init__()
        self.abandoned = threading.Event()

    def abandon(self) -> None:
        """Drop the request if it waits, or after the forward in flight if it runs."""
        self.abandoned.set()
        self.cancel()


@dataclass(frozen=True, slots=True)
class _Request:
    groups: Sequence[EncodedGroup]
    progress: Progress | None
    future: ScoresFuture = field(default_factory=ScoresFuture)


class Engine:
    """Runs requests in the order they came.

    Args:
        score: Returns the log-odds of a pack, shape (documents,).
        backend: Attention backend of the packs.
        max_batch_tokens: Linear tokens per pack.
        max_attention_tokens: Attention tokens per pack, or None.
        max_cached_tokens: Longest beginning of a head that is computed apart from its packs.
        max_cached_scores: Scores kept for prompts that come again; 0 keeps none.
        max_waiting: Requests that may wait; one more is refused.
    """

    def __init__(
        self,
        score: Callable[[Pack], NDArray[np.float32]],
        *,
        backend: str,
        max_batch_tokens: int,
        max_attention_tokens: int | None = None,
        max_cached_tokens: int = 0,
        max_cached_scores: int = 0,
        max_waiting: int = 1024,
    ) -> None:
        self._score = score
        self._backend = backend
        self._max_batch_tokens = max_batch_tokens
        self._max_attention_tokens = max_attention_tokens
        self._max_cached_tokens = max_cached_tokens
        self._known = ScoreCache(max_cached_scores) if max_cached_scores else None
        # Its put is reentrant, so that `stop` may run in a finaliser, in whatever thread and
        # wherever the garbage collector happens to call it.
        self._waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._max_waiting = max_waiting
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
        """
        refuse_fork()
        if self._waiting.qsize() >= self._max_waiting:
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
        while self._serve_next():
            pass
        self._fail_waiting()

    def _fail_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._waiting.get_nowait()
                if request is not None and request.future.set_running_or_notify_cancel():
                    request.future.set_exception(
                        ClosedError("the reranker was closed while this call waited.")
                    )

    def _serve_next(self) -> bool:
        """Serve one request and forget it before waiting again; return False to stop."""
        request = self._waiting.get()
        if request is None:
            return False
        future = request.future
        if future.set_running_or_notify_cancel():
            try:
                if self._is_closed:
                    raise ClosedError("the reranker was closed while this call waited.")
                scores = self._scores(request.groups, request.progress, future.abandoned)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(scores)
        # The error's traceback holds this frame: without the names it holds no future, hence no
        # cycle, and what a failed forward left behind is freed at once.
        del request, future
        return True

    def _scores(
        self,
        groups: Sequence[EncodedGroup],
        progress: Progress | None,
        abandoned: threading.Event,
    ) -> Scores:
        merged, places = merge_duplicates(groups)
        log_odds = [self._recall(group) for group in merged]
        unknown = [np.flatnonzero(np.isnan(row)) for row in log_odds]
        waiting = [
            Group(group.head, [group.documents[d] for d in missing], group.num_shared)
            for group, missing in zip(merged, unknown, strict=True)
        ]
        if progress is not None and self._known is not None:
            progress(sum(len(group.documents) for group in merged) - sum(map(len, unknown)))
        tokens = 0
        for seats in plan_packs(
            waiting,
            max_batch_tokens=self._max_batch_tokens,
            max_attention_tokens=self._max_attention_tokens,
            max_cached_tokens=self._max_cached_tokens,
        ):
            if self._is_closed:
                raise ClosedError("the reranker was closed while this call was scored.")
            if abandoned.is_set():
                raise CancelledError
            pack = build_pack(waiting, seats, backend=self._backend)
            scored = self._score(pack)
            if scored.shape != (len(pack.last_tokens),):
                raise Qwen3RerankerError(
                    f"the model returned scores of shape {scored.shape} for "
                    f"{len(pack.last_tokens)} documents; none are invented or dropped. Please "
                    "report this."
                )
            start = 0
            for seat in seats:
                stop = start + len(seat.documents)
                log_odds[seat.group][unknown[seat.group][list(seat.documents)]] = scored[start:stop]
                start = stop
            tokens += len(pack.token_ids)
            if progress is not None:
                progress(stop)
        aligned = [np.array([log_odds[g][d] for g, d in row], np.float32) for row in places]
        _refuse_non_finite(aligned)
        if self._known is not None:
            for group, row in zip(merged, log_odds, strict=True):
                for document, value in zip(group.documents, row.tolist(), strict=True):
                    self._known.keep(ScoreCache.key(group.head, document), value)
        return Scores(aligned, tokens)

    def _recall(self, group: Group) -> NDArray[np.float32]:
        """Return the log-odds known of each document, NaN for the others."""
        row = np.full(len(group.documents), np.nan, np.float32)
        if self._known is not None:
            for d, document in enumerate(group.documents):
                value = self._known.find(ScoreCache.key(group.head, document))
                row[d] = np.nan if value is None else value
        return row


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

"""One owner thread per model: callers queue, one forward runs at a time.

Decides when packs run and whose scores they are. Knows nothing of text, and of torch only that
`score` may be called from a thread of its own.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .errors import ClosedError, NonFiniteScoreError, OverloadedError, Qwen3RerankerError
from .packing import Pack, build_pack, merge_duplicates, plan_packs
from .tokenization import EncodedGroup

Progress = Callable[[int], object]
"""Called from the owner thread after each pack with the number of distinct documents in it."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What one request gets back.

    Attributes:
        log_odds: One float32 array per group, aligned with its documents.
        tokens: Tokens the model computed.
    """

    log_odds: list[NDArray[np.float32]]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Request:
    groups: Sequence[EncodedGroup]
    progress: Progress | None
    future: Future[Scores] = field(default_factory=Future)


class Engine:
    """Runs requests in the order they came.

    Args:
        score: Returns the log-odds of a pack, shape (documents,).
        backend: Attention backend of the packs.
        max_batch_tokens: Linear tokens per pack.
        max_attention_tokens: Attention tokens per pack, or None.
        max_waiting: Requests that may wait; one more is refused.
    """

    def __init__(
        self,
        score: Callable[[Pack], NDArray[np.float32]],
        *,
        backend: str,
        max_batch_tokens: int,
        max_attention_tokens: int | None = None,
        max_waiting: int = 1024,
    ) -> None:
        self._score = score
        self._backend = backend
        self._max_batch_tokens = max_batch_tokens
        self._max_attention_tokens = max_attention_tokens
        self._waiting: queue.Queue[_Request | None] = queue.Queue()
        self._max_waiting = max_waiting
        self._lock = threading.Lock()  # of `_is_closed` and of puts, so that none follows the stop
        self._is_closed = False
        self._owner = threading.Thread(target=self._run, name="qwen3-reranker", daemon=True)
        self._owner.start()

    def submit(
        self, groups: Sequence[EncodedGroup], *, progress: Progress | None = None
    ) -> Future[Scores]:
        """Queue groups for scoring; cancelling the future drops them while they wait.

        Raises:
            OverloadedError: If too many requests wait already.
            ClosedError: If the engine is closed.
        """
        request = _Request(groups, progress)
        with self._lock:
            if self._is_closed:
                raise ClosedError("the reranker is closed. Make a new one.")
            if self._waiting.qsize() >= self._max_waiting:
                raise OverloadedError(
                    f"{self._max_waiting} calls wait already. Try again later, or send fewer at "
                    "a time."
                )
            self._waiting.put(request)
        return request.future

    def close(self) -> None:
        """Stop the thread after the forward in flight; requests not yet scored fail."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            abandoned = []
            with contextlib.suppress(queue.Empty):  # the owner may take the last one meanwhile
                while True:
                    abandoned.append(self._waiting.get_nowait())
            self._waiting.put(None)
        for request in abandoned:
            if request is not None and request.future.set_running_or_notify_cancel():
                request.future.set_exception(
                    ClosedError("the reranker was closed while this call waited.")
                )
        if threading.current_thread() is not self._owner:
            self._owner.join()

    def _run(self) -> None:
        while self._serve_next():
            pass

    def _serve_next(self) -> bool:
        """Serve one request and forget it before waiting again; return False to stop."""
        request = self._waiting.get()
        if request is None:
            return False
        if request.future.set_running_or_notify_cancel():
            try:
                scores = self._scores(request)
            except BaseException as error:
                request.future.set_exception(error)
            else:
                request.future.set_result(scores)
        return True

    def _scores(self, request: _Request) -> Scores:
        merged, places = merge_duplicates(request.groups)
        log_odds = [np.full(len(group.documents), np.nan, np.float32) for group in merged]
        tokens = 0
        for seats in plan_packs(
            merged,
            max_batch_tokens=self._max_batch_tokens,
            max_attention_tokens=self._max_attention_tokens,
        ):
            if self._is_closed:
                raise ClosedError("the reranker was closed while this call was scored.")
            pack = build_pack(merged, seats, backend=self._backend)
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
                log_odds[seat.group][list(seat.documents)] = scored[start:stop]
                start = stop
            tokens += len(pack.token_ids)
            if request.progress is not None:
                request.progress(stop)
        aligned = [np.array([log_odds[g][d] for g, d in row], np.float32) for row in places]
        _refuse_non_finite(aligned)
        return Scores(aligned, tokens)


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

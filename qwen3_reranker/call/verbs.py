"""The verbs of a reranker, whatever scores: a model in this process, or a server.

Decides what a call accepts and returns. Knows nothing of models and connections.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar

from ..errors import Qwen3RerankerError
from . import arguments
from .job import Job, Scored, rank_all, rows_by
from .results import RankedDocument

_FEW = 1000
"""Documents that are checked, and whose results are put together, in some 5 ms."""

Result = TypeVar("Result")


class BaseReranker(ABC):
    """Checks a call, has it scored, and sorts.

    Args:
        instruction: Task sentence of calls that give none; None leaves it to what scores.
        timeout_s: Seconds for calls that give none.
    """

    def __init__(self, *, instruction: str | None, timeout_s: float | None) -> None:
        self._instruction = arguments.check_instruction(instruction)
        self._timeout_s = arguments.check_timeout(timeout_s)

    @abstractmethod
    def close(self) -> None:
        """Give up what scores, unless others share it."""

    @abstractmethod
    def _refuse_if_closed(self) -> None:
        """Raise a `ClosedError` if there is nothing left that scores."""

    @abstractmethod
    def _score(self, job: Job) -> Scored: ...

    @abstractmethod
    async def _ascore(self, job: Job) -> Scored: ...

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> list[RankedDocument]:
        """Return the documents, most relevant first; equal scores keep the caller's order.

        Args:
            query: What is looked for.
            documents: Texts to order; none gives an empty list without loading the model.
            instruction: Task sentence of this call.
            top_n: Keep this many; None keeps all.
            score_threshold: Keep only documents with at least this score.
            timeout_s: Seconds after which the call gives up, once the model is loaded; work not yet
                begun is dropped.

        Raises:
            InputError: If an argument cannot be used; nothing has been scored then.
            OverloadedError: If too many calls wait already.
            TimedOutError: If the call takes longer than its time.
            ClosedError: If the reranker is closed before the call is scored.
            Qwen3RerankerError: What else the class names.
        """
        (ranked,) = self.rank_many(
            [query],
            [documents],
            instruction=arguments.check_instruction(instruction),
            top_n=top_n,
            score_threshold=score_threshold,
            timeout_s=timeout_s,
        )
        return ranked

    async def arank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> list[RankedDocument]:
        """Return what `rank` returns without blocking the event loop.

        Raises:
            Qwen3RerankerError: As `rank`.
        """
        job = self._job_of_one(query, documents, instruction, timeout_s)
        arguments.check_cut(top_n, score_threshold)
        try:
            scored = await self._ascore(job)
            (ranked,) = await off_loop(
                job.num_documents, rank_all, job, scored, top_n, score_threshold
            )
        except Qwen3RerankerError as error:
            rankings = self._unranked(job, error)
            if rankings is None:
                raise
            (ranked,) = rankings
            return ranked[:top_n]
        return ranked

    def rank_many(
        self,
        queries: Sequence[str],
        documents: Sequence[Sequence[str]],
        *,
        instruction: str | Sequence[str | None] | None = None,
        top_n: int | None = None,
        score_threshold: float | None = None,
        timeout_s: float | None = None,
    ) -> list[list[RankedDocument]]:
        """Rank one list of documents per query, several queries to a forward.

        Args:
            queries: The queries.
            documents: For each query its documents.
            instruction: One task sentence for all, or one per query.
            top_n: As in `rank`, for each query.
            score_threshold: As in `rank`.
            timeout_s: As in `rank`, for the whole call.

        Returns:
            One ranked list per query, in the order of the queries.

        Raises:
            Qwen3RerankerError: As `rank`.
        """
        job = self._job(queries, documents, instruction, timeout_s)
        arguments.check_cut(top_n, score_threshold)
        try:
            return rank_all(job, self._score(job), top_n, score_threshold)
        except Qwen3RerankerError as error:
            rankings = self._unranked(job, error)
            if rankings is None:
                raise
            return [ranked[:top_n] for ranked in rankings]

    def score(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        timeout_s: float | None = None,
    ) -> list[float]:
        """Return P("yes") of each document, aligned with the input.

        Raises:
            Qwen3RerankerError: As `rank`.
        """
        job = self._job_of_one(query, documents, instruction, timeout_s)
        return self._score(job).probabilities

    async def ascore(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        timeout_s: float | None = None,
    ) -> list[float]:
        """Return what `score` returns without blocking the event loop.

        Raises:
            Qwen3RerankerError: As `rank`.
        """
        job = self._job_of_one(query, documents, instruction, timeout_s)
        scored = await self._ascore(job)
        return await off_loop(job.num_documents, lambda: scored.probabilities)

    def log_odds(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        timeout_s: float | None = None,
    ) -> list[float]:
        """Return logit(yes) - logit(no) of each document, aligned with the input.

        These order documents where P("yes") is 1.0 for several, and are what thresholds, teachers
        and metrics want. A calibration leaves them alone.

        Raises:
            Qwen3RerankerError: As `rank`.
        """
        job = self._job_of_one(query, documents, instruction, timeout_s)
        return self._score(job).log_odds[0]

    async def alog_odds(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        timeout_s: float | None = None,
    ) -> list[float]:
        """Return what `log_odds` returns without blocking the event loop.

        Raises:
            Qwen3RerankerError: As `rank`.
        """
        job = self._job_of_one(query, documents, instruction, timeout_s)
        return (await self._ascore(job)).log_odds[0]

    def score_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        timeout_s: float | None = None,
    ) -> list[float]:
        """Return P("yes") of each (query, document), aligned; equal queries are read once.

        Raises:
            Qwen3RerankerError: As `rank`.
        """
        job = self._job_of_pairs(pairs, instruction, timeout_s)
        return job.in_rows(self._score(job).scores)

    async def ascore_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        timeout_s: float | None = None,
    ) -> list[float]:
        """Return what `score_pairs` returns without blocking the event loop.

        Raises:
            Qwen3RerankerError: As `rank`.
        """
        count = len(pairs) if isinstance(pairs, Sequence) else 0
        job = await off_loop(count, self._job_of_pairs, pairs, instruction, timeout_s)
        scored = await self._ascore(job)
        return await off_loop(job.num_documents, lambda: job.in_rows(scored.scores))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __copy__(self) -> Self:
        """Return another reranker on the same model or server."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def _job(self, queries: Any, documents: Any, instruction: Any, timeout_s: Any) -> Job:
        """Check everything a caller gave, before any work."""
        self._refuse_if_closed()
        seconds = arguments.check_timeout(timeout_s)
        if seconds is None:
            seconds = self._timeout_s
        deadline = None if seconds is None else monotonic() + seconds
        queries, documents = arguments.check_lists(queries, documents)
        instructions = [
            self._instruction if given is None else given
            for given in arguments.check_instructions(instruction, len(queries))
        ]
        return Job(queries, documents, instructions, deadline)

    def _job_of_one(self, query: Any, documents: Any, instruction: Any, timeout_s: Any) -> Job:
        # Of one query there is one instruction: a list of one is not taken.
        given = arguments.check_instruction(instruction)
        return self._job([query], [documents], given, timeout_s)

    def _job_of_pairs(self, pairs: Any, instruction: Any, timeout_s: Any) -> Job:
        """Check pairs; those of equal queries become one list."""
        checked = arguments.check_pairs(pairs)
        rows = rows_by(query for query, _ in checked)
        documents = [[checked[row][1] for row in places] for places in rows.values()]
        job = self._job(list(rows), documents, arguments.check_instruction(instruction), timeout_s)
        return replace(job, rows=list(rows.values()))

    def _unranked(self, job: Job, error: Qwen3RerankerError) -> list[list[RankedDocument]] | None:
        """Return what stands in for rankings that failed; None lets the error through."""
        return None


async def off_loop(count: int, work: Callable[..., Result], *args: Any) -> Result:
    """Do work on so many documents, in a thread where the event loop would feel it."""
    if count <= _FEW:
        return work(*args)
    return await asyncio.to_thread(work, *args)

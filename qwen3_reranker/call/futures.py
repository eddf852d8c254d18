"""A result that one thread makes and one caller waits for.

Decides who wins where a result and an end come at once. Knows nothing of what the result is.

`concurrent.futures.Future` guards its state with a lock that a waiting caller holds now and then. A
KeyboardInterrupt that lands in its Python code at that moment leaves the lock held, and the thread
that makes the result waits for it for ever. Here a caller holds nothing: it waits in a
`SimpleQueue`, whose methods are C and end their own lock whatever comes.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class LockFreeFuture(Generic[Result]):
    """Waits for one result; safe to interrupt anywhere.

    Args:
        on_done: Called once, by the thread that sets the result, after it is set.

    Attributes:
        is_abandoned: True once the caller has left; whoever makes the result may stop.
    """

    def __init__(self, on_done: Callable[[], object] | None = None) -> None:
        self.is_abandoned = False
        self._on_done = on_done
        self._unset = [None]  # popped by whoever sets the result: list.pop is atomic
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._is_done = False
        self._arrived: queue.SimpleQueue[None] = queue.SimpleQueue()

    def abandon(self) -> None:
        """Tell whoever makes the result that nobody waits for it."""
        self.is_abandoned = True

    def done(self) -> bool:
        """Say whether there is a result or an error."""
        return self._is_done

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the result.

        Args:
            timeout_s: Seconds at most; None waits as long as it takes.

        Raises:
            TimeoutError: If there is none by then.
            BaseException: What `set_exception` was given.
        """
        self._wait(timeout_s)
        if self._error is None:
            return self._result  # type: ignore[return-value]
        try:
            raise self._error
        finally:
            del self  # or the error's traceback would lead back to it

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the end and return its error, None if it is a result.

        Raises:
            TimeoutError: As `result`.
        """
        self._wait(timeout_s)
        return self._error

    def set_result(self, result: Result) -> bool:
        """Set the result unless there is one or an error; say whether this call did."""
        return self._set(result, None)

    def set_exception(self, error: BaseException) -> bool:
        """Set an error unless there is one or a result; say whether this call did."""
        return self._set(None, error)

    def _set(self, result: Result | None, error: BaseException | None) -> bool:
        try:
            self._unset.pop()
        except IndexError:
            return False
        self._result, self._error = result, error
        self._is_done = True
        self._arrived.put(None)
        if self._on_done is not None:
            self._on_done()
        return True

    def _wait(self, timeout_s: float | None) -> None:
        if self._is_done:
            return
        try:
            self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        self._arrived.put(None)  # for whoever asks again

"""Threads that work for a model: how they end with the process, and why a fork has none.

Decides what happens at the interpreter's end and in a forked child. Knows nothing of the work.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from typing import Protocol

from ..errors import ClosedError


class Owner(Protocol):
    """Has a thread that works until it is told to stop."""

    thread: threading.Thread

    def stop(self) -> None:
        """Let the thread end after what it is at, unawaited."""
        ...


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_loaded_in: set[int] = set()
"""Ids of the processes in which a model was loaded; a fork copies them."""


def start(owner: Owner) -> None:
    """Start an owner's thread, which ends before the interpreter does."""
    owner.thread.start()
    claim_process()
    _owners.add(owner)
    _threads.add(owner.thread)


@atexit.register
def _await_threads() -> None:
    # A thread may hold the last reference to the weights. One that frees tensors while the
    # interpreter shuts down aborts the process.
    try:
        for owner in list(_owners):
            owner.stop()
        for thread in list(_threads):
            thread.join()
    except KeyboardInterrupt:  # not even the forward in flight is to be waited for
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(130)


def claim_process() -> None:
    """Note that this process loads a model; call it before, as the fork may come meanwhile."""
    _loaded_in.add(os.getpid())


def refuse_fork() -> None:
    """Refuse to score in a child process of one that has loaded a model.

    Raises:
        ClosedError: If this process was forked after it began to load a model.
    """
    if _loaded_in and os.getpid() not in _loaded_in:
        raise ClosedError(
            "a model was loaded before this process was forked from its parent; torch's threads "
            "do not exist here and a forward would hang. Load no model before the fork, or start "
            "processes by spawn."
        )

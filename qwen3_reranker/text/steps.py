"""Work in small steps, so that others may have a turn between two of them.

Decides what a step is: what a generator does after it has yielded the step's cost. Knows nothing of
the work or of who takes turns.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

Done = TypeVar("Done")

Steps: TypeAlias = Generator[int, None, Done]
"""Yields the cost of each step before it does it, in characters to be read, and returns what the
work is for."""


def finish(steps: Steps[Done]) -> Done:
    """Do all steps at once.

    Example:
        >>> def count():
        ...     yield 3
        ...     return "three characters read"
        >>> finish(count())
        'three characters read'
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            done: Done = end.value
            return done

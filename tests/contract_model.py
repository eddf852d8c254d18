"""The scripted model behind both contract suites: a text says what score it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def text(name: str, score: float | str) -> str:
    """Return a text that the model gives this score, such as 0.5 or "nan"."""
    return f"{name} scores {score}"


@dataclass
class Model:
    """Scores texts by the number at their end; one call is one forward.

    Attributes:
        surplus: How many scores too many (or, negative, too few) it returns.
        error: Raised by every call.
        lock: Anything that does not pickle, as a client's connection would not.
        calls: (query, texts) of every call.
    """

    surplus: int = 0
    error: Exception | None = None
    lock: Any = field(default=None, repr=False)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        """Return a score between 0 and 1 per text, higher for the more relevant."""
        self.calls.append((query, list(texts)))
        if self.error is not None:
            raise self.error
        scores = [float(given.rsplit(maxsplit=1)[-1]) for given in texts]
        scores = (scores + [0.5] * self.surplus)[: len(scores) + self.surplus]
        return list(np.array(scores, np.float32))  # as models do; JSON knows no such number

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel in a pickle as any client would, without what it has seen."""
        return Model, (self.surplus, self.error, self.lock)

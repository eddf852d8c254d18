"""Every error this package raises on purpose.

    Qwen3RerankerError
    ├── InputError (ValueError)            an argument of a call cannot be used
    ├── DataError (ValueError)             a line of a file cannot be used; names file and line
    ├── MissingExtraError (ImportError)    an optional dependency is not installed
    ├── ModelLoadError (RuntimeError)      a checkpoint, tokenizer or adapter cannot be used
    ├── NonFiniteScoreError (RuntimeError) the model returned NaN or infinity
    ├── RankingError (RuntimeError)        an object in a Reranker's place returned no ranking
    ├── DocumentTooLargeError (RuntimeError) a document does not fit into memory even alone
    ├── OverloadedError (RuntimeError)     the queue of waiting calls is full; nothing was started
    ├── TimedOutError (TimeoutError)       a call took longer than its timeout; its work was dropped
    ├── ReentryError (RuntimeError)        a callback of the scoring thread called the reranker
    ├── ClosedError (RuntimeError)         the reranker was closed before the call was scored
    └── RemoteError (RuntimeError)         a rerank server cannot be reached, or refused the call
        └── RemoteProtocolError            its reply is no ranking, or its prompt is not ours

Messages say what is wrong, what was got, why it cannot work where that is not plain, and what to
do next. They carry indices, lengths and types, never the text of a query or document.
"""

from __future__ import annotations

from typing import Any, Self


def shown(value: object) -> str:
    """Return what a message says of a value from outside: a number if it is short, or its type.

    A text is never quoted, and nothing of the value's own is run: Python refuses to print a whole
    number of more than 4,300 digits, and a subclass may print anything.

    Example:
        >>> shown(1.5), shown("text"), shown(10**400)
        ('1.5', 'str', 'int of 1329 bits')
    """
    number: Any = value
    kind = type(value)
    if value is None or kind is bool:
        return repr(value)
    if issubclass(kind, float):
        return float.__repr__(number)
    if issubclass(kind, int):
        size = int.bit_length(number)
        return int.__repr__(number) if size <= 64 else f"int of {size} bits"
    return kind.__name__


def named(value: object) -> str:
    """Return what a message says of a name from outside: forty characters of it, in quotes.

    For names of settings, files and tokens alone; of a text or a number it says what `shown` does.

    Example:
        >>> named("int4"), named(["int4"])
        ("'int4'", 'list')
    """
    if not issubclass(type(value), str):
        return shown(value)
    text = str.__str__(value)
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


class Qwen3RerankerError(Exception):
    """Base of every error of this package."""


class InputError(Qwen3RerankerError, ValueError):
    """An argument of a call cannot be used."""


class DataError(Qwen3RerankerError, ValueError):
    """A line of a data file cannot be used."""


class MissingExtraError(Qwen3RerankerError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""

    @classmethod
    def of(cls, what: str, library: str | None, extras: str) -> Self:
        """Return the error of something that needs a library of these extras."""
        return cls(
            f"{what} needs {library or 'a library'}, which is not installed. Run: "
            f'pip install "qwen3-reranker[{extras}]"'
        )


class ModelLoadError(Qwen3RerankerError, RuntimeError):
    """A checkpoint, tokenizer, adapter or template cannot be used."""


class NonFiniteScoreError(Qwen3RerankerError, RuntimeError):
    """The model returned NaN or infinity; a score is never invented in its place."""


class RankingError(Qwen3RerankerError, RuntimeError):
    """An object in the place of a `Reranker` lost, repeated or invented documents."""


class DocumentTooLargeError(Qwen3RerankerError, RuntimeError):
    """A document does not fit into memory even alone; the message has its index."""


class TimedOutError(Qwen3RerankerError, TimeoutError):
    """A call took longer than its timeout; what was left of its work was dropped."""


class ReentryError(Qwen3RerankerError, RuntimeError):
    """A callback of the scoring thread called the reranker, which would wait for itself."""


class OverloadedError(Qwen3RerankerError, RuntimeError):
    """The queue of waiting calls is full; the call was refused at once."""


class ClosedError(Qwen3RerankerError, RuntimeError):
    """The reranker was closed before the call was scored."""


class RemoteError(Qwen3RerankerError, RuntimeError):
    """A rerank server cannot be reached, or refused the call.

    Attributes:
        status: HTTP status of the refusal; None without one.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RemoteProtocolError(RemoteError):
    """A server's reply is no ranking, or the server does not apply the prompt template."""

"""What the LangChain and the LlamaIndex class share: settings, their checks, and who scores.

Decides what a framework component's fields mean to the core. Knows nothing of either framework.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from .call import arguments
from .call.calibration import Calibration
from .call.results import RankedDocument, Scorer
from .errors import InputError
from .reranker import DEFAULT_MAX_LENGTH, Reranker
from .text.windows import WindowScore

_OF_A_MODEL = {
    "model": "Qwen/Qwen3-Reranker-0.6B",
    "adapter": None,
    "device": None,
    "dtype": None,
    "max_length": DEFAULT_MAX_LENGTH,
    "window_score": None,
    "max_windows": None,
    "calibration": None,
}
"""Fields that say which model scores, with their defaults."""

_REMOTE = ("http://", "https://")

PASSAGE = "relevance_passage"
"""Metadata key of the best window of a document that was read in windows."""

SPAN = "relevance_span"
"""Metadata key of its start and stop, in characters of what the model read."""


class Settings(Protocol):
    """The fields of a component."""

    model: str
    adapter: str | None
    instruction: str | None
    top_n: int | None
    score_threshold: float | None
    device: str | None
    dtype: str | None
    max_length: int
    window_score: WindowScore | None
    max_windows: int | None
    calibration: Calibration | None
    reranker: Scorer | None
    _held: Scorer | None


def check_settings(settings: Settings) -> None:
    """Check all fields; loads nothing.

    Raises:
        InputError: If a field cannot be used, or describes a model beside an injected reranker.
    """
    rank_options(settings)
    ignored = [name for name, value in _OF_A_MODEL.items() if getattr(settings, name) != value]
    if settings.reranker is not None:
        if ignored:
            raise InputError(
                f"reranker is given, so {', '.join(ignored)} would have no effect. Set them on the "
                "object passed as reranker."
            )
        return
    ignored = [name for name in ignored if name != "model"]
    if settings.model.startswith(_REMOTE) and ignored:
        raise InputError(
            f"model is a server's address, so {', '.join(ignored)} would have no effect. Set them "
            "on the server."
        )
    scorer_of(settings)


def scorer_of(settings: Settings) -> Scorer:
    """Return the injected reranker, or one that shares weights with others of its settings.

    An address of a server gives a `RemoteReranker`, which shares connections likewise.

    Asked for at every call, because a field may have been assigned since. Equal settings are one
    model for as long as one of their rerankers is held, so the component holds the last.
    """
    if settings.reranker is not None:
        settings._held = None
        return settings.reranker
    if settings.model.startswith(_REMOTE):
        from .client.remote import RemoteReranker  # needs httpx

        settings._held = RemoteReranker(settings.model, instruction=settings.instruction)
        return settings._held
    held = Reranker.shared(
        settings.model,
        instruction=settings.instruction,
        **{name: getattr(settings, name) for name in _OF_A_MODEL if name != "model"},
    )
    settings._held = held
    return held


def rank_options(settings: Settings) -> dict[str, Any]:
    """Return the keywords of `rank` and `arank`, checked.

    Raises:
        InputError: If `top_n` or `score_threshold` cannot be used.
    """
    arguments.check_cut(settings.top_n, settings.score_threshold)
    return {
        "instruction": settings.instruction,
        "top_n": settings.top_n,
        "score_threshold": settings.score_threshold,
    }


def passage(text: str, result: RankedDocument) -> dict[str, Any]:
    """Return what metadata tell of the best window of a text; nothing if it was read whole.

    Example:
        >>> passage("hay needle", RankedDocument(0, "", 0.5, 0.0, False, window=(4, 10)))
        {'relevance_passage': 'needle', 'relevance_span': [4, 10]}
    """
    if result.window is None:
        return {}
    start, stop = result.window
    return {PASSAGE: text[start:stop], SPAN: [start, stop]}  # a list is what JSON gives back


def as_calibration(value: Any) -> Any:
    """Return the calibration a path leads to; anything else as it is.

    Read once, where the component is made: no later call waits for a disk, and dumps and pickles
    carry the two numbers, not a path of this machine.
    """
    return Calibration.read(value) if issubclass(type(value), (str, os.PathLike)) else value


def as_name(value: Any) -> Any:
    """Return the name of a path, torch dtype or torch device; anything else as it is."""
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    return str(value) if hasattr(value, "__fspath__") else value

"""Reranking with Qwen3-Reranker: right scores, fast, in your process.

Public names load on first use, so that `import qwen3_reranker` stays light: torch is imported when
a model is first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .call.calibration import Calibration
    from .call.results import RankedDocument, Scorer, Usage
    from .client.remote import RemoteReranker
    from .errors import (
        ClosedError,
        DataError,
        DocumentTooLargeError,
        InputError,
        MissingExtraError,
        ModelLoadError,
        NonFiniteScoreError,
        OverloadedError,
        Qwen3RerankerError,
        RankingError,
        ReentryError,
        RemoteError,
        RemoteProtocolError,
        TimedOutError,
    )
    from .reranker import Reranker
    from .text.prompt import TEMPLATES, PromptTemplate

__version__ = "0.1.0"

_HOME = {
    "Calibration": "call.calibration",
    "ClosedError": "errors",
    "DataError": "errors",
    "DocumentTooLargeError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "ModelLoadError": "errors",
    "NonFiniteScoreError": "errors",
    "OverloadedError": "errors",
    "PromptTemplate": "text.prompt",
    "Qwen3RerankerError": "errors",
    "RankedDocument": "call.results",
    "RankingError": "errors",
    "ReentryError": "errors",
    "RemoteError": "errors",
    "RemoteProtocolError": "errors",
    "RemoteReranker": "client.remote",
    "Reranker": "reranker",
    "Scorer": "call.results",
    "TEMPLATES": "text.prompt",
    "TimedOutError": "errors",
    "Usage": "call.results",
}

__all__ = [
    "TEMPLATES",
    "Calibration",
    "ClosedError",
    "DataError",
    "DocumentTooLargeError",
    "InputError",
    "MissingExtraError",
    "ModelLoadError",
    "NonFiniteScoreError",
    "OverloadedError",
    "PromptTemplate",
    "Qwen3RerankerError",
    "RankedDocument",
    "RankingError",
    "ReentryError",
    "RemoteError",
    "RemoteProtocolError",
    "RemoteReranker",
    "Reranker",
    "Scorer",
    "TimedOutError",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__

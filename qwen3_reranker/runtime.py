"""A model and its engine, loaded by the first call and freed with its last user.

Decides when weights exist and who shares them. Knows nothing of queries or documents.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from .data.demo_corpus import read_sample
from .engine.engine import Engine
from .engine.threads import claim_process, refuse_fork
from .text.prompt import PromptTemplate

if TYPE_CHECKING:
    from .model.loading import LoadedModel

Setting = str | int | PromptTemplate | None


class Runtime:
    """Loads once, on demand. Arguments are those of `load_model` and `max_cached_scores`."""

    _shared: ClassVar[weakref.WeakValueDictionary[tuple[tuple[str, Setting], ...], Runtime]] = (
        weakref.WeakValueDictionary()
    )
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, **settings: Setting) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._loaded: tuple[LoadedModel, Engine] | None = None

    def shared(self) -> Runtime:
        """Return the process's runtime with these settings: an earlier one, or this."""
        with self._shared_lock:
            return self._shared.setdefault(tuple(sorted(self.settings.items())), self)

    @property
    def is_loaded(self) -> bool:
        """Whether `load` returns at once."""
        return self._loaded is not None

    def load(self) -> tuple[LoadedModel, Engine]:
        """Return model and engine; concurrent first calls load once.

        Raises:
            ModelLoadError: If the checkpoint cannot be used; the next call tries again.
            ClosedError: If this process was forked from one that had loaded a model.
        """
        refuse_fork()  # before the lock, which a fork may have copied while it was held
        if self._loaded is not None:
            return self._loaded
        with self._lock:
            if self._loaded is None:
                claim_process()
                from .model.loading import load_model  # imports torch and transformers

                settings: dict[str, Any] = dict(self.settings)
                max_cached_scores = settings.pop("max_cached_scores", 0)
                loaded = load_model(**settings, read_sample=read_sample)
                engine = Engine(
                    loaded.network.score,
                    backend=loaded.backend,
                    budget=loaded.budget,
                    rescore=loaded.network.rescore,
                    max_cached_scores=max_cached_scores,
                )
                # Runs when the last user is gone, or at interpreter exit. The engine must not
                # point back at the runtime, or the runtime would never be collected.
                weakref.finalize(self, engine.stop)
                self._loaded = loaded, engine
            return self._loaded

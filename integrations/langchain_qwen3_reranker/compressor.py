"""A LangChain document compressor on the scoring core.

Decides how documents become texts and results become documents. Scoring, checks and order are
the core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Annotated, Any, Self

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableLambda
from pydantic import BeforeValidator, ConfigDict, PrivateAttr, model_validator
from pydantic.json_schema import SkipJsonSchema

from qwen3_reranker import Calibration, InputError, RankedDocument, Scorer
from qwen3_reranker.call import arguments
from qwen3_reranker.call.results import verify_ranking
from qwen3_reranker.framework_settings import (
    PASSAGE,
    SPAN,
    as_calibration,
    as_name,
    check_settings,
    passage,
    rank_options,
    scorer_of,
)
from qwen3_reranker.text.windows import WindowScore

Name = Annotated[str, BeforeValidator(as_name)]

_SCORE = "relevance_score"


class Qwen3Reranker(BaseDocumentCompressor):
    """Reorders retrieved documents with a Qwen3-Reranker checkpoint.

    Each returned document is a copy with `metadata["relevance_score"]`, P("yes") as a float, in
    place of an earlier value of that key. The model is loaded by the first call and shared by all
    components with the same model, adapter, device and dtype; copies and pickles carry settings
    only. In traces a compression is a run of its own, named after this class.

    Example:
        >>> compressor = Qwen3Reranker(model=model_folder, top_n=1)
        >>> documents = [Document("Tea is a drink.", id="a"), Document("Rust is a language.")]
        >>> len(compressor.compress_documents(documents, "programming"))
        1
    """

    model: Name = "Qwen/Qwen3-Reranker-0.6B"
    """Hub name, local folder, .gguf file, "embedded" (a small demo model), or a server's URL."""
    adapter: Name | None = None
    """Folder or Hub name of LoRA weights."""
    instruction: str | None = None
    """Task sentence; None is the template's own."""
    top_n: int | None = 3
    """Documents to keep; None keeps all."""
    score_threshold: float | None = None
    """Lowest score to keep."""
    device: Name | None = None
    """Torch device; None chooses."""
    dtype: Name | None = None
    """Name of a dtype; None chooses."""
    max_length: int = 8192
    """Tokens per pair; only a document's end is ever cut."""
    window_score: WindowScore | None = None
    """"max" or "mean": what does not fit is read in windows, and the best one's text stands in
    `metadata["relevance_passage"]`, its start and stop in `page_content` in
    `metadata["relevance_span"]`. None cuts."""
    max_windows: int | None = None
    """Windows of a document, from its beginning; None reads all of it."""
    calibration: Annotated[Calibration | None, BeforeValidator(as_calibration)] = None
    """File of `qwen3-finetune calibrate`, read at once, or a `Calibration`."""
    reranker: SkipJsonSchema[Scorer | None] = None
    """Any object with `rank` and `arank`, in place of a model."""

    _held: Scorer | None = PrivateAttr(default=None)

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        check_settings(self)
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return copies of the most relevant documents, best first; ties keep their order.

        Raises:
            Qwen3RerankerError: What `Reranker.rank` raises.
        """
        return self._run().invoke(_call(documents, query), self._config(callbacks))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return what `compress_documents` returns without blocking the event loop."""
        return await self._run().ainvoke(_call(documents, query), self._config(callbacks))

    def rerank(
        self,
        documents: Sequence[str | Document],
        query: str,
        *,
        instruction: str | None = None,
        top_n: int | EllipsisType | None = ...,
    ) -> list[dict[str, Any]]:
        """Return "index" and "relevance_score" of the most relevant documents, best first.

        Args:
            documents: Texts or documents.
            query: What is looked for.
            instruction: Task sentence of this call; None is the field's.
            top_n: Documents to keep, None for all; left out it is the field's.

        Raises:
            Qwen3RerankerError: What `Reranker.rank` raises.
        """
        if not isinstance(documents, str):
            documents = [d.page_content if isinstance(d, Document) else d for d in documents]
        texts = arguments.check_documents(documents)
        options = rank_options(self)
        if instruction is not None:
            options["instruction"] = instruction
        if not isinstance(top_n, EllipsisType):
            arguments.check_cut(top_n, None)
            options["top_n"] = top_n
        ranking = scorer_of(self).rank(query, texts, **options)
        verify_ranking(ranking, len(texts), options["top_n"], self.score_threshold)
        return [
            {"index": r.index, "relevance_score": float(r.score) if r.reranked else None}
            for r in ranking
        ]

    def _run(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        # A runnable is what LangChain traces: inputs, outputs, time and errors, sync and async.
        return RunnableLambda(self._compress, self._acompress)

    def _compress(self, call: dict[str, Any]) -> list[Document]:
        documents, query = call["documents"], call["query"]
        if not documents:
            return []
        return self._reordered(
            documents, scorer_of(self).rank(query, _texts(documents), **rank_options(self))
        )

    async def _acompress(self, call: dict[str, Any]) -> list[Document]:
        documents, query = call["documents"], call["query"]
        if not documents:
            return []
        return self._reordered(
            documents, await scorer_of(self).arank(query, _texts(documents), **rank_options(self))
        )

    def _reordered(
        self, documents: Sequence[Document], ranking: Sequence[RankedDocument]
    ) -> list[Document]:
        verify_ranking(ranking, len(documents), self.top_n, self.score_threshold)
        # model_copy keeps the id, which the constructor would drop.
        return [
            documents[result.index].model_copy(
                update={"metadata": _metadata(documents[result.index], result)}
            )
            for result in ranking
        ]

    def _config(self, callbacks: Callbacks | None) -> RunnableConfig:
        return {"callbacks": callbacks, "run_name": type(self).__name__}


def _metadata(document: Document, result: RankedDocument) -> dict[str, Any]:
    ours = {_SCORE, PASSAGE, SPAN}
    found = {key: value for key, value in document.metadata.items() if key not in ours}
    if result.reranked:  # what a failing server left in its place has not even an earlier score
        found[_SCORE] = float(result.score)
    return found | passage(document.page_content, result)


def _call(documents: Sequence[Document], query: str) -> dict[str, Any]:
    return {"documents": documents, "query": query}


def _texts(documents: Sequence[Document]) -> list[str]:
    for i, document in enumerate(documents):
        if not hasattr(document, "page_content"):
            raise InputError(
                f"documents[{i}] must be a LangChain Document, got {type(document).__name__}. Wrap "
                "a text in Document(page_content=text)."
            )
    return [document.page_content for document in documents]

"""A LangChain document compressor on the scoring core.

Decides how documents become texts and results become documents. Scoring, checks and order are
the core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, Self

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableLambda
from pydantic import ConfigDict, PrivateAttr, model_validator

from qwen3_reranker import RankedDocument, Reranker, Scorer, inputs
from qwen3_reranker.results import verify_ranking


class Qwen3Reranker(BaseDocumentCompressor):
    """Reorders retrieved documents with a Qwen3-Reranker checkpoint.

    Each returned document is a copy with `metadata["relevance_score"]`, P("yes") as a float, in
    place of an earlier value of that key. The model is loaded by the first call and shared by all
    instances with the same settings; copies and pickles carry settings only. In traces a call is a
    run of its own, named after this class.

    Example:
        >>> compressor = Qwen3Reranker(model=model_folder, top_n=1)
        >>> documents = [Document("Tea is a drink.", id="a"), Document("Rust is a language.")]
        >>> len(compressor.compress_documents(documents, "programming"))
        1
    """

    model: str = "Qwen/Qwen3-Reranker-0.6B"
    """Hub name, local folder, .gguf file, or "embedded" for the small demo model."""
    adapter: str | None = None
    """Folder or Hub name of LoRA weights."""
    instruction: str | None = None
    """Task sentence; None is the template's own."""
    top_n: int | None = 3
    """Documents to keep; None keeps all."""
    score_threshold: float | None = None
    """Lowest P("yes") to keep."""
    device: str | None = None
    """Torch device; None chooses."""
    dtype: str | None = None
    """Name of a dtype; None chooses."""
    max_length: int = 8192
    """Tokens per pair; only a document's end is ever cut."""
    reranker: Scorer | None = None
    """Any object with `rank` and `arank`, in place of a model."""

    _held: Scorer | None = PrivateAttr(default=None)

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        inputs.cut(self.top_n, self.score_threshold)
        self._scorer()  # loads nothing yet
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return copies of the most relevant documents, best first; ties keep their order.

        Raises:
            Qwen3RerankerError: What `Reranker.rank` raises.
        """
        return self._run().invoke(_call(documents, query), _config(callbacks))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return what `compress_documents` returns without blocking the event loop."""
        return await self._run().ainvoke(_call(documents, query), _config(callbacks))

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
        texts = [d.page_content if isinstance(d, Document) else d for d in documents]
        options = self._options()
        if instruction is not None:
            options["instruction"] = instruction
        if not isinstance(top_n, EllipsisType):
            options["top_n"] = top_n
        ranking = self._scorer().rank(query, texts, **options)
        verify_ranking(ranking, len(texts), options["top_n"], self.score_threshold)
        return [{"index": r.index, "relevance_score": float(r.score)} for r in ranking]

    def _run(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        # A runnable is what LangChain traces: inputs, outputs, time and errors, sync and async.
        return RunnableLambda(self._compress, self._acompress)

    def _compress(self, call: dict[str, Any]) -> list[Document]:
        documents, query = call["documents"], call["query"]
        if not documents:
            return []
        return self._reordered(
            documents, self._scorer().rank(query, _texts(documents), **self._options())
        )

    async def _acompress(self, call: dict[str, Any]) -> list[Document]:
        documents, query = call["documents"], call["query"]
        if not documents:
            return []
        return self._reordered(
            documents, await self._scorer().arank(query, _texts(documents), **self._options())
        )

    def _options(self) -> dict[str, Any]:
        return {
            "instruction": self.instruction,
            "top_n": self.top_n,
            "score_threshold": self.score_threshold,
        }

    def _reordered(
        self, documents: Sequence[Document], ranking: Sequence[RankedDocument]
    ) -> list[Document]:
        verify_ranking(ranking, len(documents), self.top_n, self.score_threshold)
        # model_copy keeps the id, which the constructor would drop.
        return [
            documents[result.index].model_copy(
                update={
                    "metadata": {
                        **documents[result.index].metadata,
                        "relevance_score": float(result.score),
                    }
                }
            )
            for result in ranking
        ]

    def _scorer(self) -> Scorer:
        if self.reranker is not None:
            return self.reranker
        # Asked for at every call, because a field may have been assigned since; equal settings
        # are one model for as long as one of their rerankers is held.
        self._held = Reranker.shared(
            self.model,
            adapter=self.adapter,
            device=self.device,
            dtype=self.dtype,
            max_length=self.max_length,
        )
        return self._held


def _call(documents: Sequence[Document], query: str) -> dict[str, Any]:
    return {"documents": documents, "query": query}


def _config(callbacks: Callbacks | None) -> RunnableConfig:
    return {"callbacks": callbacks, "run_name": Qwen3Reranker.__name__}


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.page_content for document in documents]

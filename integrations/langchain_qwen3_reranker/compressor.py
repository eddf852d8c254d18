"""A LangChain document compressor on the scoring core.

Decides how documents become texts and results become documents. Scoring, checks and order are
the core's.
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, PrivateAttr

from qwen3_reranker import RankedDocument, Reranker, Scorer


class Qwen3Reranker(BaseDocumentCompressor):
    """Reorders retrieved documents with a Qwen3-Reranker checkpoint.

    Each returned document is a copy with `metadata["relevance_score"]`, P("yes") as a float. The
    model is loaded by the first call and shared by all instances with the same settings.
    """

    model: str = "Qwen/Qwen3-Reranker-0.6B"
    """Hub name, local folder or .gguf file."""
    adapter: str | None = None
    """LoRA weights."""
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
    """Tokens per pair."""
    reranker: Scorer | None = None
    """Any object with `rank` and `arank`, in place of a model."""

    _loaded: Scorer | None = PrivateAttr(default=None)

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return the most relevant documents, best first."""
        ranking = self._scorer().rank(
            query,
            [document.page_content for document in documents],
            instruction=self.instruction,
            top_n=self.top_n,
            score_threshold=self.score_threshold,
        )
        return _with_scores(documents, ranking)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return what `compress_documents` returns without blocking the event loop."""
        ranking = await self._scorer().arank(
            query,
            [document.page_content for document in documents],
            instruction=self.instruction,
            top_n=self.top_n,
            score_threshold=self.score_threshold,
        )
        return _with_scores(documents, ranking)

    def _scorer(self) -> Scorer:
        if self.reranker is not None:
            return self.reranker
        if self._loaded is None:
            self._loaded = Reranker.shared(
                self.model,
                adapter=self.adapter,
                device=self.device,
                dtype=self.dtype,
                max_length=self.max_length,
            )
        return self._loaded


def _with_scores(
    documents: Sequence[Document], ranking: Sequence[RankedDocument]
) -> list[Document]:
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

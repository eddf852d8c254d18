"""A LlamaIndex node postprocessor on the scoring core.

Decides how nodes become texts and results become nodes. Scoring, checks and order are the core's.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from qwen3_reranker import InputError, RankedDocument, Reranker, Scorer


class Qwen3Reranker(BaseNodePostprocessor):
    """Reorders retrieved nodes with a Qwen3-Reranker checkpoint.

    Returns new `NodeWithScore` objects whose score is P("yes"); the caller's stay as they are. The
    model is loaded by the first call and shared by all instances with the same settings.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str = Field("Qwen/Qwen3-Reranker-0.6B", description="Hub name, folder or .gguf file.")
    adapter: str | None = Field(None, description="LoRA weights.")
    instruction: str | None = Field(None, description="Task sentence; None is the template's.")
    top_n: int | None = Field(3, description="Nodes to keep; None keeps all.")
    score_threshold: float | None = Field(None, description='Lowest P("yes") to keep.')
    device: str | None = Field(None, description="Torch device; None chooses.")
    dtype: str | None = Field(None, description="Name of a dtype; None chooses.")
    max_length: int = Field(8192, description="Tokens per pair.")
    metadata_mode: MetadataMode = Field(
        MetadataMode.EMBED, description="Which metadata the model reads before the text."
    )
    reranker: Scorer | None = Field(
        None, exclude=True, description="Any object with rank and arank, in place of a model."
    )

    _loaded: Scorer | None = PrivateAttr(default=None)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises this class."""
        return "Qwen3Reranker"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        ranking = self._scorer().rank(
            _query(query_bundle),
            self._texts(nodes),
            instruction=self.instruction,
            top_n=self.top_n,
            score_threshold=self.score_threshold,
        )
        return _reordered(nodes, ranking)

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        ranking = await self._scorer().arank(
            _query(query_bundle),
            self._texts(nodes),
            instruction=self.instruction,
            top_n=self.top_n,
            score_threshold=self.score_threshold,
        )
        return _reordered(nodes, ranking)

    def _texts(self, nodes: Sequence[NodeWithScore]) -> list[str]:
        return [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes]

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


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        raise InputError("there is no query to rerank by. Pass query_str or query_bundle.")
    return query_bundle.query_str


def _reordered(
    nodes: Sequence[NodeWithScore], ranking: Sequence[RankedDocument]
) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=nodes[result.index].node, score=float(result.score))
        for result in ranking
    ]

"""A LlamaIndex node postprocessor on the scoring core.

Decides how nodes become texts, results become nodes, and what is reported to instrumentation.
Scoring, checks and order are the core's.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Self

from llama_index.core.bridge.pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_serializer,
    model_validator,
)
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from pydantic.json_schema import SkipJsonSchema

from qwen3_reranker import Calibration, InputError, RankedDocument, Scorer
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

_RETRIEVAL_SCORE = "retrieval_score"

dispatcher = get_dispatcher(__name__)


class Qwen3Reranker(BaseNodePostprocessor):
    """Reorders retrieved nodes with a Qwen3-Reranker checkpoint.

    Returns new `NodeWithScore` objects whose score is P("yes"); the caller's stay as they are. The
    model is loaded by the first call and shared by all components with the same model, adapter,
    device and dtype; copies and pickles carry settings only. A component with an injected
    `reranker` pickles if that object does, and `from_dict` refuses its dump.

    The model reads a node as the embedding does, its metadata lines before its text, because that
    is the convention of LlamaIndex's rerankers; `metadata_mode=MetadataMode.NONE` gives it the text
    alone.

    Example:
        >>> from llama_index.core.schema import TextNode
        >>> postprocessor = Qwen3Reranker(model=model_folder, top_n=1)
        >>> nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("tea", "Rust")]
        >>> len(postprocessor.postprocess_nodes(nodes, query_str="programming"))
        1
    """

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    model: Name = Field(
        "Qwen/Qwen3-Reranker-0.6B",
        description='Hub name, folder, .gguf file, "embedded" (a small demo model) or server URL.',
    )
    adapter: Name | None = Field(None, description="Folder or Hub name of LoRA weights.")
    instruction: str | None = Field(
        None, description="Task sentence, taken as it is; None is the template's own."
    )
    top_n: int | None = Field(3, description="Nodes to keep; None keeps all.")
    score_threshold: float | None = Field(None, description="Lowest score to keep.")
    device: Name | None = Field(None, description="Torch device; None chooses.")
    dtype: Name | None = Field(None, description="Name of a dtype; None chooses.")
    max_length: int = Field(8192, description="Tokens per pair; only a document's end is ever cut.")
    window_score: WindowScore | None = Field(
        None,
        description='"max" or "mean": what does not fit is read in windows, and the text of the '
        'best one stands in the metadata of a copy of the node, as "relevance_passage", with its '
        'start and stop in what the model read, as "relevance_span", both unseen by models. None '
        "cuts.",
    )
    max_windows: int | None = Field(
        None, description="Windows of a node, from its beginning; None reads all of it."
    )
    calibration: Annotated[Calibration | None, BeforeValidator(as_calibration)] = Field(
        None, description="File of `qwen3-finetune calibrate`, read at once, or a Calibration."
    )
    metadata_mode: MetadataMode = Field(
        MetadataMode.EMBED, description="Which metadata the model reads before the text."
    )
    keep_retrieval_score: bool = Field(
        False,
        description="Whether the score a node came with is kept in the metadata of a copy of the "
        'node, as "retrieval_score", in place of an earlier value and unseen by models.',
    )
    reranker: SkipJsonSchema[Scorer | None] = Field(
        None, description="Any object with rank and arank, in place of a model."
    )

    _held: Scorer | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _accept_dump(cls, data: Any) -> Any:
        # Every dump of a LlamaIndex component has this key, and no constructor a field for it.
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key != "class_name"}
        return data

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        check_settings(self)
        return self

    @field_serializer("reranker")
    def _name_reranker(self, reranker: Scorer | None) -> str | None:
        # Its name alone, which `from_dict` refuses: left out, the default model would replace it.
        return None if reranker is None else type(reranker).__name__

    def __getstate__(self) -> dict[str, Any]:
        # LlamaIndex drops fields that do not pickle; again the default model would replace it.
        pickle.dumps(self.reranker)
        return super().__getstate__()

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises this class."""
        return "Qwen3Reranker"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reported(nodes, query_bundle) as reranked:
            query = _query(query_bundle)
            if nodes:
                texts = self._texts(nodes)
                ranking = scorer_of(self).rank(query, texts, **rank_options(self))
                reranked += self._reordered(nodes, texts, ranking)
        return reranked

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reported(nodes, query_bundle) as reranked:
            query = _query(query_bundle)
            if nodes:
                texts = self._texts(nodes)
                ranking = await scorer_of(self).arank(query, texts, **rank_options(self))
                reranked += self._reordered(nodes, texts, ranking)
        return reranked

    @contextmanager
    def _reported(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None
    ) -> Iterator[list[NodeWithScore]]:
        """Report a call's start and its end, however it ends; the result goes into the list."""
        for i, node in enumerate(nodes):
            if not isinstance(node, NodeWithScore):
                raise InputError(
                    f"nodes[{i}] must be a NodeWithScore, got {type(node).__name__}. Wrap a node "
                    "in NodeWithScore(node=node)."
                )
        reranked: list[NodeWithScore] = []
        model_name = self.model if self.reranker is None else type(self.reranker).__name__
        top_n = len(nodes) if self.top_n is None else self.top_n
        dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=top_n, model_name=model_name)
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: model_name,
            EventPayload.QUERY_STR: None if query_bundle is None else query_bundle.query_str,
            EventPayload.TOP_K: top_n,
        }
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield reranked
                event.on_end(payload={EventPayload.NODES: reranked})
        finally:
            dispatcher.event(ReRankEndEvent(nodes=reranked))

    def _texts(self, nodes: Sequence[NodeWithScore]) -> list[str]:
        return [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes]

    def _reordered(
        self,
        nodes: Sequence[NodeWithScore],
        texts: Sequence[str],
        ranking: Sequence[RankedDocument],
    ) -> list[NodeWithScore]:
        verify_ranking(ranking, len(nodes), self.top_n, self.score_threshold)
        reordered = []
        for result in ranking:
            retrieved = nodes[result.index]
            told = passage(texts[result.index], result)
            if self.keep_retrieval_score:
                told[_RETRIEVAL_SCORE] = retrieved.score
            score = float(result.score) if result.reranked else None
            reordered.append(NodeWithScore(node=_telling(retrieved.node, told), score=score))
        return reordered


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        raise InputError(
            "there is no query to rerank by, got None. Pass query_str or query_bundle."
        )
    return query_bundle.query_str


def _telling(node: BaseNode, told: dict[str, Any]) -> BaseNode:
    """Return a node with more metadata, which models do not see, or itself if nothing changes."""
    others = {key: value for key, value in node.metadata.items() if key not in (PASSAGE, SPAN)}
    if not told and len(others) == len(node.metadata):
        return node
    # A copy, because the node may live in the index; unseen, or a second reranker would read it.
    excluded = {
        name: list(dict.fromkeys([*getattr(node, name), *told]))
        for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
    }
    return node.model_copy(update={"metadata": {**others, **told}, **excluded})

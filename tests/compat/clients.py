"""Rerank clients that others wrote, unmodified, each asked for the same ranking.

    python clients.py NAME URL     prints [[index, score], ...] as the client returned them

Runs in an environment of its own, without this package; the test beside it starts it there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

QUERY = "Which planet is known as the Red Planet?"
DOCUMENTS = [
    "Venus is often called Earth's twin.",
    "Mars is often referred to as the Red Planet.",
    "Saturn, famous for its rings, is sometimes mistaken for it.",
    "Jupiter is the largest planet.",
]
KEY = "compat-key"
Ranking = list[tuple[int, float]]


def cohere_v1(url: str) -> Ranking:
    """cohere.Client posts to /v1/rerank."""
    import cohere

    client = cohere.Client(api_key=KEY, base_url=url)
    answer = client.rerank(query=QUERY, documents=DOCUMENTS, model="rerank", return_documents=True)
    assert [r.document.text for r in answer.results] == [DOCUMENTS[r.index] for r in answer.results]
    assert answer.meta.billed_units.search_units == 1
    return [(r.index, r.relevance_score) for r in answer.results]


def cohere_v1_objects(url: str) -> Ranking:
    """cohere.Client with documents as objects."""
    import cohere

    client = cohere.Client(api_key=KEY, base_url=url)
    documents = [{"text": text, "title": "x"} for text in DOCUMENTS]
    answer = client.rerank(query=QUERY, documents=documents, model="rerank", top_n=4)
    return [(r.index, r.relevance_score) for r in answer.results]


def cohere_v2(url: str) -> Ranking:
    """cohere.ClientV2 posts to /v2/rerank."""
    import cohere

    answer = cohere.ClientV2(api_key=KEY, base_url=url).rerank(
        query=QUERY, documents=DOCUMENTS, model="rerank", max_tokens_per_doc=400
    )
    assert answer.id
    return [(r.index, r.relevance_score) for r in answer.results]


def langchain_cohere(url: str) -> Ranking:
    """langchain-cohere sends max_tokens_per_doc: null."""
    from langchain_cohere import CohereRerank
    from langchain_core.documents import Document

    reranker = CohereRerank(cohere_api_key=KEY, base_url=url, model="rerank", top_n=4)
    documents = [Document(text, metadata={"i": i}) for i, text in enumerate(DOCUMENTS)]
    ranked = reranker.compress_documents(documents, QUERY)
    return [(d.metadata["i"], d.metadata["relevance_score"]) for d in ranked]


def langchain_jina(url: str) -> Ranking:
    """JinaRerank has its address in a constant."""
    from langchain_community.document_compressors import JinaRerank, jina_rerank
    from langchain_core.documents import Document

    jina_rerank.JINA_API_URL = f"{url}/v1/rerank"
    reranker = JinaRerank(jina_api_key=KEY, model="rerank", top_n=None)
    documents = [Document(text, metadata={"i": i}) for i, text in enumerate(DOCUMENTS)]
    ranked = reranker.compress_documents(documents, QUERY)
    return [(d.metadata["i"], d.metadata["relevance_score"]) for d in ranked]


def _litellm(model: str, url: str) -> Ranking:
    import litellm

    litellm.suppress_debug_info = True
    answer = litellm.rerank(
        model=model, query=QUERY, documents=DOCUMENTS, api_base=url, api_key=KEY, top_n=4
    )
    return [(r["index"], r["relevance_score"]) for r in answer.results]


def litellm_cohere(url: str) -> Ranking:
    """litellm, Cohere's provider."""
    return _litellm("cohere/rerank", url)


def litellm_jina(url: str) -> Ranking:
    """litellm, Jina's provider."""
    return _litellm("jina_ai/rerank", f"{url}/v1/rerank")


def litellm_vllm(url: str) -> Ranking:
    """litellm, vLLM's provider."""
    return _litellm("hosted_vllm/rerank", url)


def litellm_tei(url: str) -> Ranking:
    """litellm, the provider for text-embeddings-inference."""
    return _litellm("huggingface/rerank", url)


def _llama_index(reranker: Any) -> Ranking:
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [NodeWithScore(node=TextNode(text=t, id_=str(i))) for i, t in enumerate(DOCUMENTS)]
    ranked = reranker.postprocess_nodes(nodes, query_str=QUERY)
    return [(int(node.node_id), node.score) for node in ranked]


def llama_index_jina(url: str) -> Ranking:
    """LlamaIndex's JinaRerank."""
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    return _llama_index(JinaRerank(base_url=f"{url}/v1", api_key=KEY, model="rerank", top_n=4))


def llama_index_cohere(url: str) -> Ranking:
    """LlamaIndex's CohereRerank."""
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    return _llama_index(CohereRerank(api_key=KEY, base_url=url, model="rerank", top_n=4))


def llama_index_tei(url: str) -> Ranking:
    """LlamaIndex's TextEmbeddingInference, which sends texts and no model."""
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    return _llama_index(
        TextEmbeddingInference(
            base_url=url, auth_token=f"Bearer {KEY}", model_name="rerank", top_n=4
        )
    )


def curl(url: str) -> Ranking:
    """curl, as a reader of the README would."""
    body = json.dumps({"query": QUERY, "documents": DOCUMENTS})
    done = subprocess.run(
        ["curl", "-sS", "--fail-with-body", f"{url}/v1/rerank", "-d", body,  # noqa: S607
         "-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"],
        check=True, capture_output=True,
    )  # fmt: skip
    return [(r["index"], r["relevance_score"]) for r in json.loads(done.stdout)["results"]]


CLIENTS = {
    client.__name__: client
    for client in (
        cohere_v1, cohere_v1_objects, cohere_v2, langchain_cohere, langchain_jina,
        litellm_cohere, litellm_jina, litellm_vllm, litellm_tei,
        llama_index_jina, llama_index_cohere, llama_index_tei, curl,
    )
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](sys.argv[2])))

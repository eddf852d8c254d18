"""A rerank server behind the verbs of `Reranker`."""

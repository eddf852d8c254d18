"""What a call of a reranker accepts, is on its way, and returns."""

"""Qwen3-Reranker for LangChain."""

from .compressor import Qwen3Reranker

__all__ = ["Qwen3Reranker"]

"""Qwen3-Reranker for LlamaIndex."""

from .base import Qwen3Reranker

__all__ = ["Qwen3Reranker"]

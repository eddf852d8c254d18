"""Qwen3-Reranker for LlamaIndex."""

try:
    from .base import Qwen3Reranker
except ModuleNotFoundError as error:
    from qwen3_reranker import MissingExtraError

    raise MissingExtraError.of("the LlamaIndex integration", error.name, "llama-index") from error

__all__ = ["Qwen3Reranker"]

"""Qwen3-Reranker for LangChain."""

try:
    from .compressor import Qwen3Reranker
except ModuleNotFoundError as error:
    from qwen3_reranker import MissingExtraError

    raise MissingExtraError.of("the LangChain integration", error.name, "langchain") from error

__all__ = ["Qwen3Reranker"]

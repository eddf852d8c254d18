"""Fixtures of every test: checkpoints are written once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_reranker.checkpoint.embedded import EMBEDDED_BASE, embedded_folder
from tests import real_parts

# A script for the environment of `make compat`, which alone has what it imports.
collect_ignore = ["tests/compat/llama_server.py"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a random-weight Qwen3 checkpoint, or finds it again."""
    folders: dict[tuple[tuple[str, Any], ...], Path] = {}

    def write(**settings: Any) -> Path:
        key = tuple(sorted(settings.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp("checkpoint")
            folders[key] = real_parts.save_random_qwen3(folder, **settings)
        return folders[key]

    return write


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of a real pretrained checkpoint, SmolLM2-135M-Instruct."""
    return embedded_folder(EMBEDDED_BASE)


@pytest.fixture(autouse=True)
def _doctest_names(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """Give the examples in docstrings a model to load."""
    if isinstance(request.node, pytest.DoctestItem):
        doctest_namespace["model_folder"] = str(request.getfixturevalue("checkpoint")())


@pytest.fixture(scope="session")
def official_tokenizer_file() -> Path:
    """Return Qwen3's own tokenizer.json if one is at hand."""
    path = os.environ.get("QWEN3_TOKENIZER_JSON")
    if path is None:
        pytest.skip("set QWEN3_TOKENIZER_JSON to Qwen3's tokenizer.json to compare with it")
    return Path(path)

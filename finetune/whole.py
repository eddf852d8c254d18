"""A checkpoint in hand: loaded with its adapter, scored on a sample, written under its name.

Decides what a model is compared by before anything made of it is kept. Knows nothing of formats.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_reranker import Reranker, checkpoint
from qwen3_reranker.adapters import merge_adapter, recorded_template
from qwen3_reranker.prompt import PromptTemplate
from qwen3_reranker.tokenization import PromptTokenizer

SAMPLE = [
    ("how long does dough rest", ["An hour under a cloth, or overnight in the cold.", "Tea."]),
    ("capital of China", ["The capital of China is Beijing.", "Gravity pulls things down.", ""]),
    ("哪种茶不含咖啡因", ["洋甘菊茶不含咖啡因。", "def add(a, b):\n    return a + b"]),
]
"""Pairs by which a merged model is compared with what it was merged from."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A model with its adapter in it.

    Attributes:
        folder: Where its base lies.
        full: transformers' model, in the base's own dtype.
        tokenizer_json: Content of its `tokenizer.json`.
        template: Its prompt.
    """

    folder: Path
    full: Any
    tokenizer_json: str
    template: PromptTemplate

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        dtype: torch.dtype = self.full.dtype
        return dtype


def load_whole(model: str, adapter: str | None) -> Whole:
    """Load a model and add an adapter in float32.

    Raises:
        ModelLoadError: If either cannot be used.
    """
    folder, gguf_file = checkpoint.locate(model, None)
    config = checkpoint.read_config(folder, gguf_file)
    checkpoint.refuse_unsupported(config, model)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    full = checkpoint.read_weights(folder, gguf_file, config, torch.float32)
    template = None
    if adapter is not None:
        adapter_folder = checkpoint.locate(adapter, None)[0]
        template = recorded_template(None, adapter_folder)
        full = merge_adapter(full, adapter_folder)
    tokenizer_json = checkpoint.read_tokenizer(folder, gguf_file)
    template = PromptTokenizer(tokenizer_json, template).template
    return Whole(folder, full.to(dtype), tokenizer_json, template)


def sample_scores(model: str, **settings: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the log-odds of the sample."""
    queries, documents = zip(*SAMPLE, strict=True)
    with Reranker(model, **settings) as reranker:
        rankings = reranker.rank_many(queries, documents)
    return np.array(
        [
            result.log_odds
            for ranking in rankings
            for result in sorted(ranking, key=lambda result: result.index)
        ]
    )


def fill(output: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written, and give it its name when that is done."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as name:
        folder = Path(name) / output.name
        folder.mkdir()
        write(folder)
        folder.rename(output)

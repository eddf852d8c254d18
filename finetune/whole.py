"""A checkpoint in hand: loaded with its adapter, scored on a sample, written under its name.

Decides what a model is compared by before anything made of it is kept. Knows nothing of formats.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen3_reranker import Reranker
from qwen3_reranker.call.results import in_order
from qwen3_reranker.checkpoint import files
from qwen3_reranker.checkpoint.adapters import merge_adapter, template_of
from qwen3_reranker.checkpoint.folder import read_json
from qwen3_reranker.checkpoint.locate import locate, open_checkpoint
from qwen3_reranker.checkpoint.unfinished import remove_unfinished, written_whole
from qwen3_reranker.errors import InputError, Qwen3RerankerError
from qwen3_reranker.model import attention
from qwen3_reranker.text.tokenizer import PromptTokenizer

from .output import write_json

SAMPLE = [
    ("how long does dough rest", ["An hour under a cloth, or overnight in the cold.", "Tea."]),
    ("capital of China", ["The capital of China is Beijing.", "Gravity pulls things down.", ""]),
    ("哪种茶不含咖啡因", ["洋甘菊茶不含咖啡因。", "def add(a, b):\n    return a + b"]),
]
"""Pairs by which a merged model is compared with what it was merged from."""
_TOKENIZER_FILES = (
    "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Whole:
    """A model with its adapter in it.

    Attributes:
        folder: Where its base lies.
        full: transformers' model, in the base's own dtype.
        tokenizer_json: Content of its `tokenizer.json`.
        tokenizer: Encodes its prompts.
        instruction: The task sentence of a prompt for which none is given.
    """

    folder: Path
    full: Any
    tokenizer_json: str
    tokenizer: PromptTokenizer
    instruction: str

    @property
    def dtype_name(self) -> str:
        """The dtype of its weights."""
        return str(self.full.dtype).removeprefix("torch.")

    def save(self, folder: Path, full: Any = None) -> None:
        """Write the model, or another made of it, with its tokenizer.

        Other programs and older versions of transformers find what they look for, too.
        """
        (self.full if full is None else full).save_pretrained(folder)
        (folder / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        for name in _TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        if not (folder / "tokenizer_config.json").exists():  # of a GGUF; batches need padding
            end = self.tokenizer.template.control_tokens[1]
            settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
            write_json(
                folder / "tokenizer_config.json", {**settings, "eos_token": end, "pad_token": end}
            )
        config = read_json(folder / "config.json")
        theta = (config.get("rope_parameters") or {}).get("rope_theta")
        if theta is not None:  # version 4 reads it here, and would take 10,000 without a word
            write_json(folder / "config.json", {**config, "rope_theta": theta})


def load_whole(model: str, adapter: str | None, instruction: str | None = None) -> Whole:
    """Load a model and add an adapter in float32.

    Args:
        model: Hub name or folder.
        adapter: LoRA weights.
        instruction: None for the prompt's own.

    Raises:
        ModelLoadError: If either cannot be used.
    """
    folder, gguf_file, config = open_checkpoint(model, None)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    full = files.read_weights(folder, gguf_file, config, torch.float32, attention=attention.NAME)
    adapter_folder = None
    if adapter is not None:
        adapter_folder = locate(adapter, None, "adapter")[0]
        full = merge_adapter(full, adapter_folder)
    template = template_of(None, folder, adapter_folder)
    tokenizer_json = files.read_tokenizer(folder, gguf_file)
    tokenizer = PromptTokenizer(tokenizer_json, template)
    instruction = instruction or tokenizer.template.default_instruction
    return Whole(folder, full.to(dtype), tokenizer_json, tokenizer, instruction)


def sample_scores(
    model: str, *, instruction: str | None = None, **settings: Any
) -> NDArray[np.float64]:
    """Return the log-odds of the sample."""
    queries, documents = zip(*SAMPLE, strict=True)
    with Reranker(model, **settings) as reranker:
        rankings = reranker.rank_many(queries, documents, instruction=instruction)
    return np.concatenate([in_order(ranking) for ranking in rankings])


def refuse_difference(
    what: str, source: str, found: NDArray[np.float64], expected: NDArray[np.float64], bound: float
) -> None:
    """Print how far scores are from those of their source.

    Raises:
        Qwen3RerankerError: If that is more than `bound`, in log-odds.
    """
    largest = float(np.abs(found - expected).max())
    if not largest <= bound:
        raise Qwen3RerankerError(
            f"{what} scores {largest:.2g} in log-odds away from {source}, bound {bound:g}, so it "
            "is not kept. An adapter of another prompt than the model's would explain it; if that "
            "is not so, please report this with the versions of the libraries."
        )
    print(f"{what.capitalize()} scores within {largest:.1g} in log-odds of {source}, "
          f"bound {bound:g}.")  # fmt: skip


def new_folder(name: str) -> Path:
    """Return where a result is to be written.

    Raises:
        InputError: If something stands there.
    """
    output = Path(name)
    if output.exists():
        raise InputError(f"--output_dir '{output}' exists already. Name a new folder.")
    return output


def fill(output: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written, and give it its name when that is done.

    What a killed process left of a folder of that name is removed first.
    """
    remove_unfinished(output.parent, output.name)
    with written_whole(output) as folder:
        write(folder)

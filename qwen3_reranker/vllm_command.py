"""How to start vLLM so that it scores as this package does.

Decides which options a checkpoint needs. vLLM itself is never imported: it lives in an environment
of its own, and `RemoteReranker` asks it over HTTP.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import InputError
from .prompt import QWEN3_RERANKER

TEMPLATE = Path(__file__).with_name("qwen3-reranker.jinja")
"""The official prompt as vLLM renders it. The one among vLLM's own examples ends a newline early:
Jinja drops the last newline of a file, and that one counts (0.32)."""

_AS_CLASSIFIER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": [QWEN3_RERANKER.no, QWEN3_RERANKER.yes],
    "is_original_qwen3_reranker": True,
}
"""What vLLM must be told of the published causal checkpoints, which do not say it themselves."""


def vllm_command(model: str, *, port: int, tensor_parallel_size: int = 1) -> str:
    """Return the command that serves a model behind `/v1/rerank`, quoted for a shell.

    Args:
        model: Hub name, or the folder of a checkpoint or of a `qwen3-finetune export`.
        port: Where it listens.
        tensor_parallel_size: GPUs that share the model.

    Raises:
        InputError: If a number cannot be used.
        ModelLoadError: If a folder holds no checkpoint that reranks.
    """
    for name, value in (("port", port), ("tensor_parallel_size", tensor_parallel_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}. Leave it out for 1 GPU "
                             "and port 8000.")  # fmt: skip
    words = ["vllm", "serve", model, "--runner", "pooling", *_of_checkpoint(model)]
    if tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(tensor_parallel_size)]
    return shlex.join([*words, "--port", str(port)])


def _of_checkpoint(model: str) -> list[str]:
    """Return the options that say what the checkpoint does not."""
    overridden = ["--chat-template", str(TEMPLATE), "--hf-overrides", json.dumps(_AS_CLASSIFIER)]
    folder = Path(model)
    if not folder.is_dir():
        return overridden  # on the Hub, where the published ones are; vLLM fetches it
    checkpoint.open_checkpoint(model, None)
    config: dict[str, Any] = checkpoint.read_json(folder / "config.json")
    if config["architectures"][0].endswith("ForSequenceClassification"):
        return ["--chat-template", str(_own(folder, "score_template.jinja"))]
    if "classifier_from_token" in config:
        own = _own(folder, "chat_template.jinja")
        return ["--convert", "classify", "--chat-template", str(own)]
    return overridden


def _own(folder: Path, name: str) -> Path:
    """Return the template that an export wrote, for it knows the adapter's prompt; or ours."""
    return folder / name if (folder / name).is_file() else TEMPLATE

"""How vLLM is started on a reranker, so that it scores what this package scores.

Decides the options that a checkpoint's configuration asks for, and the prompt. vLLM itself stays in
an environment of its own and is never imported.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..call import arguments
from ..errors import InputError, ModelLoadError
from ..reranker import DEFAULT_MAX_LENGTH

SCORE_TEMPLATE = Path(__file__).with_name("score_template.jinja")
"""The prompt of Qwen3-Reranker for vLLM, byte for byte; vLLM's own example is a newline short."""

# A causal checkpoint becomes a classifier of one label when vLLM loads it.
_AS_CLASSIFIER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}


def vllm_settings(model: str) -> tuple[dict[str, Any], Path]:
    """Return what `vllm.LLM` must be told about a model, and the file of its prompt.

    Args:
        model: Hub name or folder: the published checkpoints, their sequence-classification
            conversions, merged models and what `qwen3-finetune export` writes.

    Raises:
        InputError: If vLLM cannot score with it as it is.
        ModelLoadError: If it has no configuration that can be read.
    """
    folder = _locate(model)
    config = _read_config(folder)
    architecture = (config.get("architectures") or ["none"])[0]
    longest = config.get("max_position_embeddings", DEFAULT_MAX_LENGTH)
    settings: dict[str, Any] = {
        "runner": "pooling", "max_model_len": min(DEFAULT_MAX_LENGTH, longest)
    }  # fmt: skip
    exported = folder / "score_template.jinja"
    if architecture.endswith("ForSequenceClassification") and exported.is_file():
        return settings, exported
    if config.get("method") == "from_2_way_softmax":  # the export for sentence-transformers
        return {**settings, "convert": "classify"}, folder / "chat_template.jinja"
    if architecture == "Qwen3ForSequenceClassification" and len(config.get("id2label", "01")) == 1:
        return settings, SCORE_TEMPLATE
    if architecture == "Qwen3ForCausalLM":
        return {**settings, "hf_overrides": _AS_CLASSIFIER}, SCORE_TEMPLATE
    raise InputError(
        f"vLLM cannot be told how '{model}' scores: its architecture is {architecture}, not "
        f"Qwen3's. Run: qwen3-finetune export --format seq-cls --model {shlex.quote(model)} "
        "--output_dir exported, and pass that folder."
    )


def vllm_command(model: str, *, tensor_parallel_size: int = 1, port: int = 8000) -> str:
    """Return the line that serves a model, for a shell of the environment with vLLM.

    Args:
        model: As in `vllm_settings`.
        tensor_parallel_size: GPUs that share the weights.
        port: Where it listens, on this machine only.

    Raises:
        InputError: As `vllm_settings`.
        ModelLoadError: As `vllm_settings`.
    """
    settings, template = vllm_settings(model)
    options = {**settings, "chat_template": str(template), "host": "127.0.0.1", "port": port}
    if arguments.check_positive_int("tensor_parallel_size", tensor_parallel_size) > 1:
        options["tensor_parallel_size"] = tensor_parallel_size
    words = ["vllm", "serve", model]
    for name, value in options.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def _locate(model: str) -> Path:
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return path.resolve()
    try:
        return Path(snapshot_download(model, allow_patterns=["config.json", "*.jinja"]))
    except Exception as error:
        raise ModelLoadError(
            f"the configuration of '{model}' could not be fetched from the Hub "
            f"({type(error).__name__}). Check the name and the connection, or pass a local folder."
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"'{folder}' is an adapter, and vLLM serves whole rerankers only. Run: qwen3-finetune "
            f"merge --model BASE --adapter {shlex.quote(str(folder))} --output_dir merged, and "
            "pass that folder."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(
            f"'{folder}' has no config.json that can be read ({type(error).__name__}). Pass the "
            "folder of a checkpoint, or a Hub name."
        ) from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"'{folder}/config.json' must hold an object. Fetch it again.")
    return config

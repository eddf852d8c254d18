"""Files of a checkpoint, read or refused.

Decides which files and architectures are admitted. Only safetensors and GGUF are read, nothing that
lies outside of the folder, and no code of a checkpoint is ever run. Knows nothing of devices,
prompts or scores.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import ModelLoadError, named, shown
from ..text.prompt import QWEN3_RERANKER
from ..text.tokenizer import panic_is_error
from . import gguf_header
from .folder import read_json, refuse_other_weights

_SUPPORTED = ("qwen3", "qwen2", "llama")
# Their frequencies change with the longest position of a forward, so a score would depend on the
# other documents of its pack.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def read_config(folder: Path, gguf_file: str | None) -> Any:
    """Return the transformers configuration of a checkpoint.

    Raises:
        ModelLoadError: If there is none, or it asks for code of its own.
    """
    if gguf_file is None:
        file = folder / "config.json"
        if not file.is_file():
            raise ModelLoadError(
                f"'{folder}' has no config.json, so it is not a checkpoint. Pass a folder written "
                "by save_pretrained, a .gguf file or a Hub name."
            )
        raw = read_json(file)
        if "auto_map" in raw:
            raise ModelLoadError(
                f"'{file}' asks for code of its own (auto_map), which is never run here. Use a "
                "checkpoint in the standard Qwen3 format."
            )
        if raw.get("transformers_weights") is not None:
            refuse_other_weights(
                file, raw["transformers_weights"], ".safetensors", ".safetensors.index.json"
            )
        if (folder / "adapter_config.json").is_file():
            raise ModelLoadError(
                f"'{folder}' holds an adapter beside its model, which would be taken in unchecked. "
                "Move the adapter's files to a folder of their own and pass that as adapter=."
            )
        _refuse_decoder(raw.get("model_type"), folder)
        _refuse_counts(raw, file)
    elif fault := gguf_header.find_fault(folder / gguf_file):
        raise ModelLoadError(
            f"'{folder / gguf_file}' is damaged: {fault}. Fetch the file again, from a source you "
            "trust."
        )
    try:
        extra = {} if gguf_file is None else {"gguf_file": gguf_file}
        with _alone(folder, gguf_file) as source:
            config = transformers.AutoConfig.from_pretrained(
                source, local_files_only=True, trust_remote_code=False, **extra
            )
    except Exception as error:
        raise ModelLoadError(
            f"the configuration of '{folder}' cannot be read ({type(error).__name__}). Fetch the "
            'checkpoint again; GGUF files need: pip install "qwen3-reranker[gguf]"'
        ) from error
    _refuse_decoder(config.model_type, folder)
    if not config.architectures:  # GGUF files do not say
        config.architectures = [f"{config.model_type.capitalize()}ForCausalLM"]
    return config


def read_tokenizer(folder: Path, gguf_file: str | None) -> str:
    """Return the content of a checkpoint's `tokenizer.json`.

    Raises:
        ModelLoadError: If there is none.
    """
    file = folder / "tokenizer.json"
    try:
        if file.is_file():  # also beside a GGUF file, whose own vocabulary is only a rebuilt one
            return file.read_text(encoding="utf-8")
        if gguf_file is None:
            raise ModelLoadError(
                f"'{folder}' has no tokenizer.json. Copy the one of the base model into it."
            )
        with _alone(folder, gguf_file) as source, panic_is_error():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, gguf_file=gguf_file, local_files_only=True, trust_remote_code=False
            )
            state = json.loads(tokenizer.backend_tokenizer.to_str())
    except ModelLoadError:
        raise
    except Exception as error:  # of several libraries
        raise ModelLoadError(
            f"the tokenizer of '{folder}' cannot be read ({type(error).__name__}). Copy the "
            "tokenizer.json of the base model beside the weights."
        ) from error
    added = {token["content"] for token in state["added_tokens"]}
    lost = (set(QWEN3_RERANKER.control_tokens) & set(state["model"]["vocab"])) - added
    if lost:  # transformers 5.17: the prompt would be another, and none would notice
        raise ModelLoadError(
            f"transformers {transformers.__version__} takes {', '.join(sorted(lost))} in "
            f"'{gguf_file}' for plain text. Copy the tokenizer.json of the base model beside the "
            "file, or update transformers."
        )
    if "qwen" in type(tokenizer).__name__.lower():
        state["normalizer"] = {"type": "NFC"}  # lost in a GGUF file; Qwen composes its text
    return json.dumps(state)


def read_weights(
    folder: Path,
    gguf_file: str | None,
    config: Any,
    dtype: str | torch.dtype,
    *,
    attention: str,
    quantization: Any = None,
) -> Any:
    """Load every tensor the architecture asks for, or fail: none is ever left at random.

    Args:
        folder: Of the checkpoint.
        gguf_file: Name of a GGUF file in it; None for safetensors.
        config: Of `read_config`.
        dtype: Of the tensors, or "auto" for the checkpoint's own.
        attention: Name of the attention that transformers uses.
        quantization: How bitsandbytes rounds weights; None for not at all.

    Returns:
        A transformers model with its head, of the architecture that the configuration names.

    Raises:
        ModelLoadError: If a file is broken or a tensor is missing.
    """
    is_causal = config.architectures[0].endswith("ForCausalLM")
    auto: Any = (
        transformers.AutoModelForCausalLM
        if is_causal
        else (transformers.AutoModelForSequenceClassification)
    )
    extra: dict[str, Any] = {"use_safetensors": True}
    if quantization is not None:
        extra["quantization_config"] = quantization
    if gguf_file is not None:
        extra = {
            "gguf_file": gguf_file,
            "quantization_config": transformers.GgufConfig(gguf_file=gguf_file, dequantize=True),
        }
    try:
        with _alone(folder, gguf_file) as source:
            full, report = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
    except Exception as error:
        raise ModelLoadError(
            f"the weights in '{folder}' cannot be read ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Only complete "
            "safetensors or GGUF files load; fetch the checkpoint again."
        ) from error
    heads = [key for key in report["unexpected_keys"] if key.startswith(("cls", "score"))]
    if heads:
        raise ModelLoadError(
            f"the checkpoint in '{folder}' has a head of its own ({heads[0]}) that "
            f"{config.architectures[0]} would leave out, so its scores would be others. Use the "
            "safetensors checkpoint it was converted from."
        )
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        causal = config.architectures[0].replace("ForSequenceClassification", "ForCausalLM")
        remedy = (
            f"It seems to be a causal checkpoint: name {causal} in its config.json."
            if lacking == ["score.weight"]
            else "Fetch the checkpoint again."
        )
        raise ModelLoadError(
            f"the checkpoint in '{folder}' lacks {len(lacking)} tensors that "
            f"{config.architectures[0]} needs, the first is {lacking[0]}; left alone they would be "
            f"random and so would every score. {remedy}"
        )
    return full


@contextmanager
def _alone(folder: Path, gguf_file: str | None) -> Iterator[Path]:
    """Yield a folder to read from: for a GGUF file, one that holds that file and no other.

    Beside weights that were named alone, transformers would follow an adapter's, a generation's or
    a tokenizer's configuration, to wherever it leads.
    """
    if gguf_file is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as alone:
        os.symlink((folder / gguf_file).resolve(), Path(alone, gguf_file))
        yield Path(alone)


def _refuse_counts(raw: dict[str, Any], file: Path) -> None:
    """Refuse numbers of which transformers makes lists as long, before it does."""
    for name in ("num_hidden_layers", "num_labels"):
        value = raw.get(name)
        if value is not None and not (type(value) is int and value <= gguf_header.MOST_LAYERS):
            raise ModelLoadError(
                f"{name} in '{file}' must be a whole number of at most {gguf_header.MOST_LAYERS}, "
                f"got {shown(value)}. Fetch the checkpoint again, from a source you trust."
            )


def _refuse_decoder(model_type: object, folder: Path) -> None:
    if model_type not in _SUPPORTED:
        raise ModelLoadError(
            f"'{folder}' cannot be packed exactly: its decoder is {named(model_type)}, not one of "
            f"{', '.join(_SUPPORTED)}. Use a Qwen3-Reranker checkpoint or a fine-tune of one."
        )


def refuse_unsupported(config: Any, model: str) -> None:
    """Refuse what a packed forward would get wrong.

    Raises:
        ModelLoadError: If the head, a layer or the rotary embedding is of a kind it is not for.
    """
    names = config.architectures
    architecture = names[0] if isinstance(names, list) else names
    family = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[config.model_type]
    parameters = getattr(config, "rope_parameters", None) or {}
    rope = parameters.get("rope_type", "default") if isinstance(parameters, dict) else None
    types = getattr(config, "layer_types", None) or ()
    others = [kind for kind in types if kind != "full_attention"]
    problem = None
    if not isinstance(names, list) or architecture not in (
        f"{family}ForCausalLM",
        f"{family}ForSequenceClassification",
    ):
        problem = f"its architecture is {named(architecture)}, which has no yes/no head"
    elif not isinstance(rope, str):
        problem = "its rotary embedding is described by what is no name"
    elif getattr(config, "is_causal", None) is False:
        problem = "its attention looks both ways (is_causal is false)"
    elif architecture.endswith("ForSequenceClassification") and config.num_labels != 1:
        problem = f"it classifies into {shown(config.num_labels)} labels, a reranker has one"
    elif others:
        problem = f"it has layers of type {named(others[0])}, packs need full attention"
    elif getattr(config, "attn_logit_softcapping", None):
        problem = "its attention scores are soft-capped"
    elif rope in _LENGTH_DEPENDENT_ROPE:
        problem = f"its rotary embedding is {named(rope)}, so scores depend on pack companions"
    if problem:
        raise ModelLoadError(
            f"'{model}' cannot be packed exactly: {problem}. Use a Qwen3-Reranker checkpoint or "
            "a fine-tune of one."
        )

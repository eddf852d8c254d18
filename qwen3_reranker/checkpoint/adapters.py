"""LoRA adapters: what was recorded of their training, and the merge into their base.

Decides which adapter fits which base. Only safetensors are read. Knows nothing of devices and
scores.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import MissingExtraError, ModelLoadError, named
from ..text.prompt import TEMPLATES, PromptTemplate
from ..text.strings import as_string
from .folder import read_json

logger = logging.getLogger(__name__)

ADAPTER_RECORD = "qwen3_reranker.json"
"""File beside an adapter's weights that records what it was trained with."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SHAPE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "tie_word_embeddings",
)  # fmt: skip
_SAMPLED = 1024
_REFUSED_SETTINGS = ("megatron_config", "layer_replication", "loftq_config", "eva_config",
         "corda_config", "arrow_config")  # fmt: skip
"""Settings of an adapter by which peft imports modules by name, or builds other layers."""
_NAMES_OF_MODULES: dict[str, tuple[type, ...]] = {
    "target_modules": (str, list), "exclude_modules": (str, list), "layers_pattern": (str, list),
    "modules_to_save": (list,), "rank_pattern": (dict,), "alpha_pattern": (dict,),
}  # fmt: skip
"""Settings of an adapter that name modules of the base, and how JSON has them."""
_PLAIN_PATTERN = re.compile(r"(\.\*)?[\w.|()^$\\-]*")
"""After one `.*` names and choices of names, and nothing that repeats."""
_TIED = ("lm_head", "model.embed_tokens")
"""Modules that may share their weights."""
_MOST_WAYS = 10_000
"""To match all patterns of an adapter. Forty choices of two in a row have a trillion ways."""


def fingerprint(full: Any) -> str:
    """Return a hash of a base's shape and of a fixed sample of its weights.

    Samples are rounded to bfloat16, so that it does not matter in which dtype the base is loaded.
    Takes milliseconds, and tells apart bases of the same shape, which an adapter would fit without
    a word.
    """
    decoder = full.base_model
    layers = decoder.layers
    tensors = [decoder.embed_tokens.weight, decoder.norm.weight]
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        tensors += [layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight]
    return _digest(full, tensors)


def scoring_fingerprint(full: Any, head: torch.Tensor) -> str:
    """Return a hash of all that scores: like `fingerprint`, of every tensor and the yes/no row.

    An adapter may have changed any of them. Taken before the cast to the serving dtype, so that a
    base with an adapter and the merge of the two are one.
    """
    return _digest(full, [*full.base_model.parameters(), head])


def _digest(full: Any, tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256(
        json.dumps({name: getattr(full.config, name) for name in _SHAPE}).encode()
    )
    for tensor in tensors:
        flat = tensor.detach().flatten()
        sample = flat[:: max(len(flat) // _SAMPLED, 1)].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def template_of(
    asked: PromptTemplate | None, model: Path, adapter: Path | None
) -> PromptTemplate | None:
    """Return the template asked for, or recorded by training; None leaves it to the tokenizer.

    Args:
        asked: What the caller wants.
        model: Folder of the checkpoint, which has a record where full fine-tuning left it.
        adapter: Folder of the LoRA weights, if there are any.

    Raises:
        ModelLoadError: If the record names another template, or cannot be read.
    """
    if adapter is None and not (model / ADAPTER_RECORD).is_file():
        return asked
    return recorded_template(asked, adapter or model)


def recorded_template(asked: PromptTemplate | None, folder: Path) -> PromptTemplate | None:
    """Return the template asked for or recorded in a folder; None leaves it to the tokenizer.

    Raises:
        ModelLoadError: If the record names another template, or cannot be read.
    """
    record_file = folder / ADAPTER_RECORD
    if not record_file.is_file():
        _warn_once(folder)
        return asked
    try:
        record = read_json(record_file)["template"]
        recorded_id, recorded_hash = as_string(record["id"]), as_string(record["hash"])
    except (KeyError, TypeError) as error:
        raise ModelLoadError(
            f"'{record_file}' has no template id and hash. Train the adapter again, or delete the "
            "file to load it unchecked."
        ) from error
    known = asked or TEMPLATES.get(recorded_id)
    if known is None or (known.id, known.hash) != (recorded_id, recorded_hash):
        here = f"{named(known.id)} ({known.hash[:12]})" if known else "unknown"
        raise ModelLoadError(
            f"'{folder}' was trained with template {named(recorded_id)} "
            f"({recorded_hash[:12]}), but the prompt here is {here}, which would change its "
            "scores. Pass template=None, or the PromptTemplate that trained it."
        )
    return known


def adapter_weights(folder: Path) -> Path:
    """Return the file of an adapter's weights.

    Raises:
        ModelLoadError: If there is none; pickled weights are never read.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ModelLoadError(
            f"adapter '{folder}' has no {ADAPTER_WEIGHTS}. Save it with "
            "save_pretrained; pickled weights are never read."
        )
    return file


def merge_adapter(full: Any, folder: Path) -> Any:
    """Return the model with LoRA weights merged into it, in the model's dtype.

    Raises:
        ModelLoadError: If the adapter has no safetensors file or does not fit the model.
        MissingExtraError: Without peft.
    """
    weights = adapter_weights(folder)
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError.of(f"adapter '{folder}'", error.name, "finetune") from error
    _refuse_adapter(full, folder)
    refuse_other_base(fingerprint(full), folder)
    try:
        with no_alias_warning():
            tuned = PeftModel.from_pretrained(full, folder)
        # By itself peft asks the Hub whether the vocabulary has grown; embeddings never train.
        wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
        with safe_open(str(weights), "pt") as file:
            stored = set(file.keys())
        if wanted != stored:
            raise ValueError(f"{len(wanted ^ stored)} tensors have no counterpart")
        return tuned.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ModelLoadError(
            f"adapter '{folder}' does not fit the base model ({type(error).__name__}). Load it on "
            "the base it was trained on."
        ) from error


@contextmanager
def no_alias_warning() -> Iterator[None]:
    """Keep back what users cannot mend: peft 0.21 reads an alias that transformers deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _refuse_adapter(full: Any, folder: Path) -> None:
    """Refuse an adapter whose merge would lose its head or change tied weights it never saw."""
    settings = read_json(folder / "adapter_config.json")
    wanted = "CAUSAL_LM" if hasattr(full, "lm_head") else "SEQ_CLS"
    problem = None
    refused = sorted(name for name in settings if name in _REFUSED_SETTINGS and settings[name])
    patterns = _patterns(settings)
    if settings.get("peft_type", "LORA") != "LORA":
        problem = f"it is of type {named(settings['peft_type'])}, not LORA"
    elif refused:
        problem = f"its adapter_config.json sets {', '.join(refused)}, which is not followed here"
    elif patterns is None:
        problem = "its adapter_config.json names modules by what is no string"
    elif not _match_soon(patterns):
        problem = "it names modules by a pattern that could take for ever to match; list them"
    elif settings.get("task_type") not in (wanted, None):
        problem = f"it was trained for {named(settings['task_type'])}, this base is {wanted}"
    elif full.config.tie_word_embeddings and any(
        _targets(settings.get("target_modules"), name) for name in _TIED
    ):
        problem = "it adapts an embedding that this base ties to its head, which no merge can keep"
    if problem:
        raise ModelLoadError(
            f"adapter '{folder}' does not fit the base model: {problem}. Load it on the base it "
            "was trained on, or train it without those modules."
        )


def _patterns(settings: dict[str, Any]) -> list[str] | None:
    """Return what peft matches against the names of modules, or None if some are no strings."""
    found: list[str] = []
    for name, kinds in _NAMES_OF_MODULES.items():
        value: Any = settings.get(name)
        if value is None:
            continue
        if type(value) not in kinds:
            return None
        found += [value] if isinstance(value, str) else list(value)
    return found if all(isinstance(pattern, str) for pattern in found) else None


def _targets(modules: str | list[str] | None, name: str) -> bool:
    """Say whether an adapter is for the module of this name, as peft reads what it is for."""
    if isinstance(modules, str):
        try:
            return re.fullmatch(modules, name) is not None
        except (re.error, RecursionError):  # which peft says then, too
            return False
    return any(f".{name}".endswith(f".{module}") for module in modules or ())


def _match_soon(patterns: Iterable[str]) -> bool:
    """Say whether patterns are matched in a moment, whatever the name."""
    left = _MOST_WAYS
    for pattern in patterns:
        if not _PLAIN_PATTERN.fullmatch(pattern):
            return False
        ways, choices = 1, [1]  # of what is closed, and of each group that is open
        for mark in pattern:
            if mark == "(":
                choices.append(1)
            elif mark == "|":
                choices[-1] += 1
            elif mark == ")" and len(choices) > 1:
                ways *= choices.pop()
            if ways * choices[-1] > left:
                return False
        left -= ways * math.prod(choices)
    return left >= 0


def recorded_base(folder: Path) -> str | None:
    """Return the base that an adapter's folder names, None without such a folder or name."""
    name = _base_record(folder).get("name")
    file = folder / "adapter_config.json"
    if name is None and file.is_file():  # of other trainers
        name = read_json(file).get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def _base_record(folder: Path) -> dict[str, Any]:
    file = folder / ADAPTER_RECORD
    base = read_json(file).get("base") if file.is_file() else None
    if base is not None and not isinstance(base, dict):
        raise ModelLoadError(
            f"'{file}' must describe the base in an object, got {type(base).__name__}. Train the "
            "adapter again, or delete the file to load it unchecked."
        )
    return base or {}


def refuse_other_base(found: str, folder: Path) -> None:
    """Refuse a base other than the one recorded; older records name no fingerprint.

    Args:
        found: `fingerprint` of the base at hand.
        folder: Of the adapter.

    Raises:
        ModelLoadError: If the record names another.
    """
    recorded = _base_record(folder).get("fingerprint")
    if recorded is not None and recorded != found:
        raise ModelLoadError(
            f"adapter '{folder}' was trained on other weights than these (recorded base: "
            f"{named(recorded_base(folder))}), so its scores would mean nothing. Load it on that "
            "base, in the revision it was trained on."
        )


@cache
def _warn_once(folder: Path) -> None:
    logger.warning(
        "Adapter '%s' has no %s, so neither its prompt nor its base can be checked.",
        folder,
        ADAPTER_RECORD,
    )

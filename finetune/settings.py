"""What decides the course of a run: the settings and data that one that goes on must have, too.

Decides which settings those are. What is logged, kept, or measured once is not among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import transformers

from qwen3_reranker.checkpoint.adapters import adapter_weights
from qwen3_reranker.checkpoint.locate import locate

from .config import RerankerArguments
from .output import hash_file
from .reading import Data, paraphrases
from .trainee import Base, Trainee

_FREE = {
    "train_file", "eval_file", "guard_file", "paraphrase_file", "adapter",  # their content counts
    "max_batch_tokens", "skip_bad", "allow_leaks", "allow_changed", "dry_run",
}  # fmt: skip
"""Of our own settings those that may change."""
_TRAINING = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha",
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "bf16", "fp16",
    "eval_strategy", "eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy",
    "ignore_data_skip", "save_only_model",
)  # fmt: skip
"""Of the Trainer's settings those that may not."""
_LORA = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules", "use_rslora": "use_rslora", "use_dora": "use_dora",
}  # fmt: skip
"""Flags of LoRA and their names in peft."""


def deciding_settings(
    arguments: RerankerArguments,
    training: transformers.TrainingArguments,
    base: Base,
    trainee: Trainee,
    data: Data,
) -> dict[str, Any]:
    """Return what decides the course of a run, by the names of the flags, ready for JSON."""
    watched = {name: lists for name, lists in data.lists.items() if name not in data.guards}
    lora = {} if base.peft is None else _LORA
    return {
        **{name: value for name, value in asdict(arguments).items() if name not in _FREE},
        **{name: _plain(getattr(training, name, None)) for name in _TRAINING},
        # Wherever it lies, a base with the same weights is the same.
        "model_name_or_path": trainee.fingerprint or f"{base.name}@{base.revision}",
        "dtype": base.dtype,
        "quantization": None if base.quantization is None else str(base.quantization),
        "use_peft": base.peft is not None,
        **{flag: _plain(getattr(base.peft, name)) for flag, name in lora.items()},
        "train_file": [file.sha256 for file in data.files],
        "eval_file": _digest(watched),
        "paraphrase_file": _digest(paraphrases(arguments.paraphrase_file)),
        "adapter": None if arguments.adapter is None else _weights(arguments.adapter),
    }


def _weights(adapter: str) -> str:
    return hash_file(adapter_weights(locate(adapter, None, "adapter")[0]))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; the order of a set is another in each process."""
    if isinstance(value, Collection) and not isinstance(value, str):
        return sorted(map(str, value.items() if isinstance(value, dict) else value))
    return value if isinstance(value, bool | int | float) or value is None else str(value)


def _digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()

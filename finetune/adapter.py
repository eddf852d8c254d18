"""What a run leaves behind: weights, and a record of what they were trained with.

Decides the files of the output folder. The core reads the weights and refuses the adapter if its
record names another template.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import transformers

from qwen3_reranker.checkpoint.adapters import ADAPTER_RECORD

from .config import RerankerArguments
from .data import TrainingFile
from .output import write_json
from .publish import write_card
from .trainee import Base, Trainee

_LIBRARIES = ("qwen3-reranker", "torch", "transformers", "tokenizers", "peft", "accelerate", "trl")


def save_adapter(
    folder: Path,
    trainee: Trainee,
    base: Base,
    arguments: RerankerArguments,
    training: transformers.TrainingArguments,
    files: Sequence[TrainingFile],
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write weights (safetensors), record, resolved settings and model card.

    The card has the name of the run's output folder, into which the files are to be moved.
    A fully fine-tuned model is written with its tokenizer and loads as a model of its own.
    """
    trainee.save(folder)
    if base.peft is not None:
        _name_base(folder / "adapter_config.json", base.name)
    template = trainee.tokenizer.template
    record = {
        "template": {"id": template.id, "hash": template.hash},
        "base": {
            "name": base.name,
            "revision": base.revision,
            "commit": trainee.commit,
            "fingerprint": trainee.fingerprint,
        },
    }
    write_json(folder / ADAPTER_RECORD, record)
    run = {
        **record,
        "arguments": asdict(arguments),
        "training": training.to_sanitized_dict(),
        "data": [
            {
                "path": file.path,
                "sha256": file.sha256,
                "lines": file.num_lines,
                "accepted": file.num_rows,
                "rejected": len(file.rejected),
            }
            for file in files
        ],
        "versions": _versions(),
        "history": list(history),
    }
    write_json(folder / "run.json", run)
    output, source = Path(str(training.output_dir)).name, base.name
    if Path(source).exists():
        source = Path(source).resolve().name
    named = f'"{output}"' if base.peft is None else f'"{source}", adapter="{output}"'
    write_card(
        folder, source, template, template.default_instruction,
        f"qwen3_reranker.Reranker({named})", name=output,
        notes=f"Fine-tuned from {source} with the loss {arguments.loss}. Data and settings: "
        "run.json. What it gained, with confidence intervals: report.html.",
    )  # fmt: skip


def _name_base(file: Path, name: str) -> None:
    """Put the base's name where peft writes the folder it was read from on this machine."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {**settings, "base_model_name_or_path": name})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found

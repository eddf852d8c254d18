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

from qwen3_reranker.adapters import ADAPTER_RECORD

from .config import RerankerArguments
from .data import TrainingFile
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

    The card names the run's output folder, into which the files are to be moved.
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
    (folder / "README.md").write_text(_card(str(training.output_dir), base, run), encoding="utf-8")


def _name_base(file: Path, name: str) -> None:
    """Put the base's name where peft writes the folder it was read from on this machine."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {**settings, "base_model_name_or_path": name})


def _card(folder: str, base: Base, run: Mapping[str, Any]) -> str:
    how = (
        f'reranker = Reranker("{folder}")'
        if base.peft is None
        else f'reranker = Reranker("{base.name}", adapter="{folder}")'
    )
    return f"""---
base_model: {base.name}
library_name: {"transformers" if base.peft is None else "peft"}
pipeline_tag: text-ranking
tags: [reranker, cross-encoder, qwen3-reranker{"" if base.peft is None else ", lora"}]
---
# Qwen3-Reranker fine-tune of {base.name}

A yes/no cross-encoder: P("yes") says whether a document meets an instruction for a query.

```python
from qwen3_reranker import Reranker

{how}
results = reranker.rank("a query", ["a document", "another"])
```

Prompt template `{run["template"]["id"]}` ({run["template"]["hash"][:12]}), loss
`{run["arguments"]["loss"]}`, learning rate {run["training"]["learning_rate"]}, seed
{run["training"]["seed"]}. Data and settings: `run.json`. What it gained, with confidence
intervals: `report.html`. Scores order the documents of one query; they are not calibrated.
"""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file that people read, too."""
    file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

"""Where a checkpoint or an adapter lies: on disk or on the Hub.

Decides which files of a folder may be followed: none that lies outside of it. Knows nothing of what
is in them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ..data.jsonl import MAX_LINE_BYTES
from ..errors import ModelLoadError

EMBEDDED = "embedded"
"""The `model` that means the embedded reranker; a folder of that name is written `./embedded`."""

EMBEDDED_BASE = "embedded-base"
"""The `model` that means its base, which was not trained to rerank."""


def locate(model: str, revision: str | None, what: str = "model") -> tuple[Path, str | None]:
    """Return the local folder of a checkpoint or adapter and, for a GGUF file, its name.

    Raises:
        ModelLoadError: If it is neither on disk nor to be had from the Hub, or leads elsewhere.
    """
    if model in (EMBEDDED, EMBEDDED_BASE):
        from .embedded import embedded_folder  # which reads its files as any other's

        return embedded_folder(model), None
    # Not Path's own, which raise where a name is too long for a file or a user unknown.
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        _refuse_outsiders(path)
        return path, None
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"{what} is the file '{model}', but only .gguf files load alone. Pass the folder "
                "that holds config.json, tokenizer.json and the safetensors files."
            )
        return path.parent, path.name
    try:
        # Patterns keep pickled weights off the disk as well as out of the process.
        folder = snapshot_download(
            model, revision=revision, allow_patterns=["*.json", "*.safetensors"]
        )
    except HFValidationError as error:
        raise ModelLoadError(
            f"{what} '{model}' is not a folder here and not a Hub name either. Check the path."
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"{what} '{model}' could not be fetched from the Hub ({type(error).__name__}). Check "
            "the name, the connection and HF_TOKEN, or pass a local folder."
        ) from error
    _refuse_outsiders(Path(folder))
    return Path(folder), None


def stamp(model: str) -> list[tuple[str, int, int]]:
    """Return path, size and time of a model's or adapter's weights: others, another answer.

    Raises:
        ModelLoadError: If they cannot be found.
    """
    folder, gguf_file = locate(model, None)
    found = sorted(folder.glob(gguf_file or "*.safetensors"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        ModelLoadError: If it cannot be read or parsed.
    """
    try:
        with file.open("rb") as opened:
            raw = opened.read(MAX_LINE_BYTES + 1)
        if len(raw) > MAX_LINE_BYTES:
            raise ModelLoadError(
                f"'{file}' has more than {MAX_LINE_BYTES} bytes, which no settings need. Fetch the "
                "checkpoint again."
            )
        content = json.loads(raw.decode("utf-8"))
    except ModelLoadError:
        raise
    except OSError as error:
        raise ModelLoadError(
            f"'{file}' cannot be read ({type(error).__name__}). Fetch the checkpoint again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"'{file}' is not valid JSON. Fetch it again.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(
            f"'{file}' must hold an object, got {type(content).__name__}. Fetch it again."
        )
    return content


def _refuse_outsiders(folder: Path) -> None:
    """Refuse links that lead out of a folder, and an index that names anything but weights in it.

    A snapshot in the Hub's cache is made of links to the blobs of its own repository.
    """
    try:
        root = folder.resolve(strict=True)
        targets = {
            file: file.resolve(strict=True)
            for pattern in ("*.json", "*.safetensors")
            for file in sorted(folder.glob(pattern))
        }
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise ModelLoadError(
            f"a link in '{folder}' leads nowhere ({type(error).__name__}). Fetch the checkpoint "
            "again."
        ) from error
    places, repository = [root], root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        places.append(repository / "blobs")
    for file, target in targets.items():
        if not any(map(target.is_relative_to, places)):
            raise ModelLoadError(
                f"'{file}' is a link out of its folder, which is not followed: what it leads to "
                "is not part of the checkpoint. Copy the file itself into the folder."
            )
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_json(index).get("weight_map")
        for name in shards.values() if isinstance(shards, dict) else [shards]:
            refuse_other_weights(index, name, ".safetensors")


def refuse_other_weights(source: Path, name: object, *suffixes: str) -> None:
    """Refuse to read weights by a name that is not of a safetensors file beside its source."""
    is_plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
    if not is_plain or not str(name).endswith(suffixes):
        raise ModelLoadError(
            f"'{source}' names weights other than the safetensors files beside it, which are never "
            "read. Fetch the checkpoint again, from a source you trust."
        )

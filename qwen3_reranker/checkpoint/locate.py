"""Where a checkpoint or an adapter lies: on disk, on the Hub, or in a package.

Decides what a name means. Knows nothing of weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ..errors import ModelLoadError
from .embedded import EMBEDDED, EMBEDDED_BASE, embedded_folder
from .files import read_config, refuse_unsupported
from .folder import refuse_outsiders


def locate(model: str, revision: str | None, what: str = "model") -> tuple[Path, str | None]:
    """Return the local folder of a checkpoint or adapter and, for a GGUF file, its name.

    Raises:
        ModelLoadError: If it is neither on disk nor to be had from the Hub, or leads elsewhere.
    """
    if model in (EMBEDDED, EMBEDDED_BASE):
        return embedded_folder(model), None
    # Not Path's own, which raise where a name is too long for a file or a user unknown.
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        refuse_outsiders(path)
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
    refuse_outsiders(Path(folder))
    return Path(folder), None


def stamp(model: str) -> list[tuple[str, int, int]]:
    """Return path, size and time of a model's or adapter's weights: others, another answer.

    Raises:
        ModelLoadError: If they cannot be found.
    """
    folder, gguf_file = locate(model, None)
    found = sorted(folder.glob(gguf_file or "*.safetensors"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def open_checkpoint(model: str, revision: str | None) -> tuple[Path, str | None, Any]:
    """Return the folder of a checkpoint, the name of a GGUF file, and a supported configuration.

    Raises:
        ModelLoadError: If it cannot be found or read, or is of no kind that is supported.
    """
    folder, gguf_file = locate(model, revision)
    config = read_config(folder, gguf_file)
    refuse_unsupported(config, model)
    return folder, gguf_file, config

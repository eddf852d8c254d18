"""A folder of results: one run at a time writes into it, and what is in it is whole or unfinished.

Decides how files get their names: the manifest, with the size and hash of every file, is written
last and by rename, after all of it has reached the disk. Knows nothing of what the files hold.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qwen3_reranker.errors import InputError, Qwen3RerankerError

MANIFEST = "manifest.json"
LOCK = ".lock"
UNFINISHED = ".unfinished"
"""Where a result lies until it is whole."""

logger = logging.getLogger(__name__)


class DamagedError(Qwen3RerankerError):
    """A folder does not agree with its manifest, or has none."""


class WriteError(Qwen3RerankerError):
    """A disk is full, or does not take what is written for another reason."""

    status = os.EX_IOERR


def commit(folder: Path, names: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Write the manifest of a folder that is complete, once all of it has reached the disk.

    Args:
        folder: Where the files lie.
        names: Of the files, relative to the folder.
        settings: What they were trained with; a run that goes on compares its own.
    """
    files = {}
    for name in sorted(names):
        _sync(folder / name)
        files[name] = [(folder / name).stat().st_size, hash_file(folder / name)]
    for inner in {(folder / name).parent for name in files}:
        _sync(inner)
    content = {"files": files, "settings": settings}
    text = json.dumps({**content, "sha256": _hash(content)}, indent=1)
    write_whole(folder / MANIFEST, text)
    _sync(folder)
    _sync(folder.parent)


def verify(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder's manifest if every file is what it says.

    Raises:
        DamagedError: If one is not, or there is no manifest.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        stated = content.pop("sha256")
        files, settings = content["files"], content["settings"]
    except FileNotFoundError as error:
        raise DamagedError(f"'{folder}' was not finished: it has no {MANIFEST}") from error
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"'{folder}' is damaged: its {MANIFEST} cannot be read") from error
    if stated != _hash(content):
        raise DamagedError(f"'{folder}' is damaged: its {MANIFEST} was changed")
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"'{folder}' is damaged: {name} is missing")
        if file.stat().st_size != size:
            found = file.stat().st_size
            raise DamagedError(f"'{folder}' is damaged: {name} has {found} bytes, not {size}")
        if hash_file(file) != digest:
            raise DamagedError(f"'{folder}' is damaged: the content of {name} was changed")
    verified: dict[str, Any] = settings
    return verified


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Keep other runs out of a folder until the block, or the process in whatever way, ends.

    Raises:
        InputError: If another run is in it.
    """
    with open(output / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"another run writes to '{output}', process {file.read() or 'unknown'}. Wait for "
                "it, or write elsewhere."
            ) from error
        except OSError as error:  # some network file systems know no locks
            logger.warning("'%s' cannot be locked against a second run (%s).", output, error)
        with suppress(OSError):  # a full disk; the lock holds all the same
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def writing(folder: Path, num_bytes: int) -> Iterator[None]:
    """Remove a folder if it cannot be written.

    Raises:
        WriteError: With the bytes that it takes.
    """
    try:
        yield
    except Qwen3RerankerError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # A full disk is a RuntimeError to torch.save, and to safetensors one of its own.
        shutil.rmtree(folder, ignore_errors=True)
        raise WriteError(
            f"'{folder}' could not be written ({type(error).__name__}: {error}). It takes about "
            f"{num_bytes:,} bytes and was removed; checkpoints before it are whole. Make room, "
            "then go on with --resume_from_checkpoint true."
        ) from error


def space_warnings(output: Path, num_bytes: int, count: int) -> list[str]:
    """Return what to say if so many checkpoints do not fit on a disk."""
    free = shutil.disk_usage(output).free
    if free >= count * num_bytes:
        return []
    return [
        f"A checkpoint takes about {num_bytes:,} bytes, up to {count} lie in '{output}' at a time, "
        f"and {free:,} bytes are free there."
    ]


def publish(folder: Path, output: Path) -> list[str]:
    """Move the files of a finished folder into another; return their names.

    What makes a model loadable comes last, so that half of one is none.
    """
    names = sorted(os.listdir(folder), key=lambda name: (name.endswith("config.json"), name))
    (output / MANIFEST).unlink(missing_ok=True)
    for name in reversed(names):
        (output / name).unlink(missing_ok=True)
    for name in names:
        _sync(folder / name)
        (folder / name).replace(output / name)
    folder.rmdir()
    return names


def _sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or, if the process or the machine ends before, not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    _sync(part)
    part.replace(file)


def whole_lines(file: Path) -> list[str]:
    """Return the lines of a file that grows, and cut off what a killed run left half-written."""
    if not file.exists():
        return []
    content = file.read_bytes()
    end = content.rfind(b"\n") + 1
    os.truncate(file, end)
    return content[:end].decode().split("\n")[:-1]  # no other end of line ends one


def write_json(file: Path, content: Any) -> None:
    """Write a file that people read, too."""
    file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def hash_file(file: str | Path) -> str:
    """Return the sha256 of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

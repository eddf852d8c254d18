"""Folders that are there whole or not at all.

Decides where a folder lies until it is whole, and which unfinished ones may be removed: a writer
holds a lock on its own for as long as it lives, however it dies. Knows nothing of what is written.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves is not removed there
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".unfinished"


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a new folder to write to, which becomes `target` when the block has ended.

    It is removed if the block fails, and by `remove_unfinished` if the process was killed.

    Raises:
        OSError: If it cannot be written, or another has become `target` meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    outer = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    lock = None
    with suppress(OSError):  # a file system without locks: nobody can take it for free either
        lock = _lock(outer)
    try:
        # Only now has it a name by which others remove it, if its lock is free.
        outer = outer.rename(outer.with_name(outer.name + _SUFFIX))
        inner = outer / target.name  # with the user's permissions; those of `outer` are tighter
        inner.mkdir()
        yield inner
        inner.rename(target)
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in a folder, and nothing that one is writing.

    A file system that several machines share must share its locks, too.

    Args:
        folder: Where `written_whole` was to put its target.
        name: Of that target; None for any.
    """
    pattern = "*" if name is None else glob.escape(name)
    for left in folder.glob(f".{pattern}-*{_SUFFIX}"):
        with suppress(OSError):  # in use, gone by now, or not ours to remove
            lock = _lock(left)
            try:
                shutil.rmtree(left)
            finally:
                os.close(lock)


def _lock(folder: Path) -> int:
    """Return a handle that holds a folder's lock until it is closed or the process ends.

    Raises:
        OSError: If another has it, or there are no such locks here.
    """
    if fcntl is None:
        raise OSError("no locks")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle

"""What an attack may cost: seconds, memory, log."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_mb(pid: int | str = "self") -> float:
    """Return the resident memory of a process in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 1e6


class _LogSize(logging.Handler):
    """Counts the bytes that would be written."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.written = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.written += len(self.format(record))


@contextmanager
def bounded(
    *, seconds: float, megabytes: float, log_bytes: int = 10_000, pid: int | str = "self"
) -> Iterator[None]:
    """Fail if the block takes longer, or a process more memory, or the log more room.

    Args:
        seconds: Wall time.
        megabytes: Growth of the resident memory at its highest.
        log_bytes: What this process may log meanwhile.
        pid: The process whose memory is watched.
    """
    size, root, over = _LogSize(), logging.getLogger(), threading.Event()
    before = highest = resident_mb(pid)

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.005):
            highest = max(highest, resident_mb(pid))

    watcher = threading.Thread(target=watch, daemon=True)
    root.addHandler(size)
    watcher.start()
    started = time.monotonic()
    try:
        yield
        took = time.monotonic() - started
        highest = max(highest, resident_mb(pid))
    finally:
        over.set()
        watcher.join()
        root.removeHandler(size)
    grown = highest - before
    assert took <= seconds, f"took {took:.1f} s, {seconds} allowed"
    assert grown <= megabytes, f"took {grown:.0f} MB more, {megabytes} allowed"
    assert size.written <= log_bytes, f"logged {size.written} bytes, {log_bytes} allowed"

"""What a process that serves has libraries keep."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3_reranker.web import memory

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return what glibc is told, on a machine that has it."""
    told: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *setting: told.append(setting))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda file: "flags: avx512f")
    for name in (*KERNELS, "MALLOC_ARENA_MAX"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    return told


def test_caches_and_arenas_are_few(arenas: list[tuple[int, int]]) -> None:
    memory.keep_little()
    assert [os.environ[name] for name in KERNELS] == ["64", "64"]
    assert arenas == [(-8, 2)]


def test_who_starts_the_process_decides(
    arenas: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*KERNELS, "MALLOC_ARENA_MAX"):
        monkeypatch.setenv(name, "7")
    memory.keep_little()
    assert [os.environ[name] for name in KERNELS] == ["7", "7"]
    assert arenas == []


def test_kernels_that_take_long_are_kept(
    arenas: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda file: "flags: avx512f amx_bf16")
    memory.keep_little()
    assert not set(KERNELS) & set(os.environ)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_machines_are_left_as_they_are(
    platform: str, arenas: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(file: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "read_text", absent)
    memory.keep_little()
    assert arenas == []


def test_other_libc_is_left_as_it_is(
    arenas: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    memory.keep_little()

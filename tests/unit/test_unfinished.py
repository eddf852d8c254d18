from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.whole import fill
from qwen3_reranker.checkpoint import unfinished
from qwen3_reranker.checkpoint.unfinished import remove_unfinished, written_whole

WRITER = """
import sys, time
from pathlib import Path
from qwen3_reranker.checkpoint.unfinished import written_whole

with written_whole(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half of th")
    print("half-way", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "model"


@pytest.fixture
def writer(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that is half-way through writing the target."""
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half-way\n"
        yield process
        process.kill()


def kill(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    assert process.wait() == -number


def test_folder_is_whole_and_as_open_as_any_other(target: Path) -> None:
    target.parent.mkdir()
    (target.parent / "other").mkdir()
    with written_whole(target) as folder:
        (folder / "weights").write_text("all of them")
        assert not target.exists()
    assert (target / "weights").read_text() == "all of them"
    assert target.stat().st_mode == (target.parent / "other").stat().st_mode
    assert sorted(os.listdir(target.parent)) == ["model", "other"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failed_block_leaves_nothing(target: Path, error: type[BaseException]) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_text("half of th")
        raise error

    with pytest.raises(error):
        fill(target, write)
    assert os.listdir(target.parent) == []


def test_target_of_another_is_left_as_it_is(target: Path) -> None:
    def write(_: Path) -> None:
        target.mkdir()
        (target / "weights").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        fill(target, write)
    assert os.listdir(target.parent) == ["model"]
    assert (target / "weights").read_text() == "theirs"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("name", [None, "model"])
def test_what_a_killed_process_left_is_removed(
    target: Path, writer: subprocess.Popen[str], number: int, name: str | None
) -> None:
    kill(writer, number)
    assert os.listdir(target.parent) != []
    remove_unfinished(target.parent, name)
    assert os.listdir(target.parent) == []


def test_what_a_process_is_writing_stays(target: Path, writer: subprocess.Popen[str]) -> None:
    before = os.listdir(target.parent)
    remove_unfinished(target.parent)
    assert os.listdir(target.parent) == before
    assert list(target.parent.rglob("weights"))


def test_nothing_else_is_removed(target: Path, writer: subprocess.Popen[str]) -> None:
    kill(writer, signal.SIGKILL)
    (left,) = target.parent.iterdir()
    for name in ("mine.unfinished", ".unfinished", ".model-abc", ".other-abc.unfinished"):
        (target.parent / name).mkdir()
    (target.parent / ".model-file.unfinished").write_text("no folder")
    (target.parent / ".model-link.unfinished").symlink_to(target.parent / "mine.unfinished")
    before = set(target.parent.iterdir())
    remove_unfinished(target.parent, "model")
    assert set(target.parent.iterdir()) == before - {left}


def test_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / ".model-abc.unfinished").mkdir()
    remove_unfinished(tmp_path, "[m]odel")
    assert (tmp_path / ".model-abc.unfinished").exists()
    remove_unfinished(tmp_path / "none")


def test_without_locks_folders_are_written_and_nothing_is_removed(
    target: Path, writer: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(writer, signal.SIGKILL)
    before = os.listdir(target.parent)
    monkeypatch.setattr(unfinished, "fcntl", None)
    remove_unfinished(target.parent)
    assert os.listdir(target.parent) == before
    with written_whole(target) as folder:
        (folder / "weights").write_text("all of them")
    assert sorted(os.listdir(target.parent)) == sorted([*before, "model"])


def test_merge_and_export_leave_no_half_model_of_that_name(
    target: Path, writer: subprocess.Popen[str]
) -> None:
    kill(writer, signal.SIGKILL)
    fill(target, lambda folder: (folder / "weights").touch())
    assert os.listdir(target.parent) == ["model"]

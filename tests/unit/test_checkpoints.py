"""Manifests, where a run goes on, rotation, locks and signals, on folders of small files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from finetune import checkpoints, output
from finetune.checkpoints import StopSignals, differences, is_complete, rotate, starting_point
from finetune.groups import Example
from finetune.output import (
    MANIFEST,
    DamagedError,
    WriteError,
    commit,
    only_run,
    publish,
    space_warnings,
    verify,
    writing,
)
from finetune.train import early_stopping
from finetune.trainer import _FiniteOrStop
from qwen3_reranker.errors import InputError, NonFiniteScoreError

SETTINGS = {"learning_rate": 1e-4, "seed": 1, "train_file": ["abc"], "loss": "hybrid"}
FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth")


def checkpoint(run: Path, step: int, *, best: int | None = None, ended: bool = False) -> Path:
    """Write a committed checkpoint of small files."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 9)
    state = {
        "global_step": step,
        "best_model_checkpoint": None if best is None else f"elsewhere/checkpoint-{best}",
        "stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": ended}}},
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    commit(folder, [*FILES, "trainer_state.json"], SETTINGS)
    return folder


def start(run: Path, wanted: str | None = "true", **changes: Any) -> tuple[Any, list[str]]:
    """Return where a run would go on, and what it says."""
    said: list[str] = []
    settings = {**SETTINGS, **changes.pop("settings", {})}
    options = {"allow_changed": False, "needs_best": True, **changes}
    return starting_point(run, wanted, settings, say=said.append, **options), said


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "deleted": lambda file, _: file.unlink(),
    "halved": lambda file, _: os.truncate(file, file.stat().st_size // 2),
    "end zeroed": lambda file, _: file.write_bytes(file.read_bytes()[:-20] + bytes(20)),
    "one bit": lambda file, _: file.write_bytes(
        file.read_bytes()[:-7] + bytes([file.read_bytes()[-7] ^ 1]) + file.read_bytes()[-6:]
    ),
    "of another": lambda file, other: shutil.copyfile(other, file),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "trainer_state.json", MANIFEST])
def test_a_damaged_checkpoint_is_skipped_aloud(tmp_path: Path, name: str, kind: str) -> None:
    older, newer = checkpoint(tmp_path, 4), checkpoint(tmp_path, 12)
    assert start(tmp_path)[0].checkpoint == newer
    DAMAGE[kind](newer / name, older / name)
    found, said = start(tmp_path)
    assert found.checkpoint == older
    assert "Skipped checkpoint-12" in said[0]
    assert get_last_checkpoint(str(tmp_path)) == str(newer), "which is what the Trainer would take"


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    manifest = folder / MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        manifest.write_bytes(changed)
        with pytest.raises(DamagedError):
            verify(folder)
    manifest.write_bytes(content)
    assert verify(folder) == SETTINGS


def test_a_damaged_best_state_is_not_gone_on_with(tmp_path: Path) -> None:
    best, newer = checkpoint(tmp_path, 4, best=4), checkpoint(tmp_path, 8, best=4)
    assert start(tmp_path)[0].best() == best, "beside it, wherever the folder was when it ran"
    (best / "optimizer.pt").unlink()
    found, said = start(tmp_path)
    assert found is None
    assert len(said) == 3
    assert start(tmp_path, needs_best=False)[0].checkpoint == newer


def test_an_unfinished_run_is_neither_overwritten_nor_gone_on_with_unasked(tmp_path: Path) -> None:
    assert start(tmp_path, None)[0] is None
    found, said = start(tmp_path)
    assert (found, "no checkpoint" in said[0]) == (None, True)
    (tmp_path / "checkpoint-2").mkdir()  # not even whole
    for wanted in (None, "false"):
        with pytest.raises(InputError) as refused:
            start(tmp_path, wanted)
        assert "--resume_from_checkpoint true" in str(refused.value)
        assert "another --output_dir" in str(refused.value)


def test_a_checkpoint_by_name_is_taken_or_refused(tmp_path: Path) -> None:
    older = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 8)
    assert start(tmp_path, str(older))[0].checkpoint == older
    (older / "optimizer.pt").unlink()
    for wanted in (older, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="Pass true"):
            start(tmp_path, str(wanted))


def test_weights_alone_are_not_gone_on_from(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    commit(folder, ["adapter_model.safetensors"], {**SETTINGS, "save_only_model": True})
    found, said = start(tmp_path, settings={"save_only_model": True})
    assert (found, "--save_only_model" in said[0]) == (None, True)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    changed = {"learning_rate": 2e-4, "train_file": ["abd"], "new_in_this_version": 1}
    with pytest.raises(InputError, match="another learning_rate, train_file"):
        start(tmp_path, settings=changed)
    found, _ = start(tmp_path, settings=changed, allow_changed=True)
    assert found.changed == {"learning_rate", "train_file"}
    assert (
        differences({"a": [1, None], "b": {"c": 1.5}}, {"a": (1, None), "b": {"c": 1.5}}) == set()
    )


def test_an_ended_run_is_not_trained_for_one_step_more(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    assert start(tmp_path)[0].ended() is None
    checkpoint(tmp_path, 8, ended=True)
    assert start(tmp_path)[0].ended().global_step == 8
    longer = {"max_steps": 20}
    commit(tmp_path / "checkpoint-8", FILES, {**SETTINGS, "max_steps": 8})
    assert start(tmp_path, settings=longer, allow_changed=True)[0].ended() is None
    found, _ = start(tmp_path, settings={"learning_rate": 2e-4}, allow_changed=True)
    with pytest.raises(InputError, match=r"other settings \(learning_rate\) would have no effect"):
        found.ended()


def test_patience_is_that_of_the_run_that_goes_on() -> None:
    before, now = early_stopping(3), early_stopping(10)
    before.early_stopping_patience_counter = 2
    assert type(now).__name__ == "EarlyStoppingCallback", "as checkpoints of all versions name it"
    restored = type(now).from_state(before.state())  # as the Trainer does
    assert (restored.early_stopping_patience, restored.early_stopping_patience_counter) == (10, 2)


def test_a_finished_folder_is_complete_until_it_is_changed(tmp_path: Path) -> None:
    assert not is_complete(tmp_path, SETTINGS, allow_changed=False)
    (tmp_path / "run.json").write_text("{}")
    commit(tmp_path, ["run.json"], SETTINGS)
    assert is_complete(tmp_path, SETTINGS, allow_changed=False)
    other = {**SETTINGS, "seed": 2}
    with pytest.raises(InputError, match="another seed"):
        is_complete(tmp_path, other, allow_changed=False)
    assert not is_complete(tmp_path, other, allow_changed=True)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run\.json was changed since"):
        is_complete(tmp_path, SETTINGS, allow_changed=False)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, None, {8}), (2, None, {6, 8}), (2, 2, {2, 8}), (2, 8, {6, 8}), (1, 4, {4, 8}),
     (3, 2, {2, 6, 8})],
)  # fmt: skip
def test_rotation_keeps_the_newest_and_the_best(
    tmp_path: Path, limit: int, best: int | None, left: set[int]
) -> None:
    folders = {step: checkpoint(tmp_path, step) for step in (2, 4, 6, 8)}
    later = tmp_path / "checkpoint-10"
    later.mkdir()
    rotate(folders[8], None if best is None else str(folders[best]), limit)
    found = {step for step, folder in folders.items() if folder.exists()}
    assert found == left
    assert later.exists(), "it may be what a run that goes on from an older one comes to"


def test_rotation_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    good, unfinished = checkpoint(tmp_path, 2), tmp_path / "checkpoint-4"
    unfinished.mkdir()
    rotate(checkpoint(tmp_path, 6), None, 2)
    assert (good.exists(), unfinished.exists()) == (True, False)
    # The Trainer deletes the only good one for an unfinished one.
    shutil.rmtree(tmp_path / "checkpoint-6")
    unfinished.mkdir()
    rotate_checkpoints(str(tmp_path), save_total_limit=1)
    assert (good.exists(), unfinished.exists()) == (False, True)


def test_rotation_that_is_cut_short_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
    rotate(newer, None, 1)
    with pytest.raises(DamagedError, match="not finished"):
        verify(older)
    verify(newer)


def test_a_second_run_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1 on this machine")  # of a process that was killed
    second = only_run(tmp_path)
    with only_run(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"):
        second.__enter__()
    with only_run(tmp_path):
        pass


def test_a_file_system_without_locks_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run(tmp_path):
        assert "cannot be locked" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_the_second_is_not(number: int) -> None:
    came = []
    before = {each: signal.signal(each, lambda got, _: came.append(got))
              for each in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert (signals.received, came) == (number, [])
            os.kill(os.getpid(), number)
            assert came == [number]
        os.kill(os.getpid(), number)
        assert came == [number] * 2, "handlers are put back"
        with StopSignals() as signals:
            pass
        os.kill(os.getpid(), number)
        assert (signals.received, came) == (None, [number] * 3)
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signals.received is None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_training_in_a_thread_goes_without_signals() -> None:
    failures = []

    def use() -> None:
        try:
            with StopSignals():
                pass
        except ValueError as error:  # signal only works in main thread
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("unexpected pos")])
def test_what_cannot_be_written_is_removed_and_said(tmp_path: Path, error: Exception) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "optimizer.pt").write_text("half")
    with pytest.raises(WriteError) as failed, writing(folder, 1234):
        raise error
    assert not folder.exists()
    assert failed.value.status == 74
    assert failed.value.__cause__ is error
    assert "about 1,234 bytes" in str(failed.value)
    with pytest.raises(InputError), writing(folder, 1):
        raise InputError("not about writing")


def test_little_space_is_said_before_training(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert not space_warnings(tmp_path, 10, 3)
    (warning,) = space_warnings(tmp_path, free, 3)
    assert "up to 3" in warning


def test_half_a_result_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"adapter_config.json", "adapter_model.safetensors", "qwen3_reranker.json"}
    result, left = tmp_path / "run" / ".unfinished", 0

    def write(version: str) -> None:
        result.mkdir(parents=True, exist_ok=True)
        for name in names:
            (result / name).write_text(version)

    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    for count in range(len(names) + 1):
        left = 99
        write("old")
        commit(result.parent, publish(result, result.parent), SETTINGS)
        write("new")
        left = count
        if count < len(names):
            with pytest.raises(KeyboardInterrupt):
                publish(result, result.parent)
            assert not (result.parent / "adapter_config.json").exists()
        else:
            assert set(publish(result, result.parent)) == names
            assert {(result.parent / name).read_text() for name in names} == {"new"}
        assert not (result.parent / MANIFEST).exists()


def test_manifest_comes_after_all_else_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    sync, replace = output._sync, Path.replace
    monkeypatch.setattr(output, "_sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (done.append("renamed"), replace(path, to))[1]
    )
    checkpoint(tmp_path, 4)
    part = f"{MANIFEST}.part"
    assert set(done[:4]) == {*FILES, "trainer_state.json"}
    assert done[4:] == ["checkpoint-4", part, "renamed", "checkpoint-4", tmp_path.name]


def examples(*rows: int) -> list[Example]:
    return [Example(None, [1.0], row) for row in rows]  # type: ignore[arg-type]


def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_with_its_rows() -> None:
    model = torch.nn.Linear(2, 1)
    arguments = transformers.TrainingArguments(use_cpu=True)

    def step(value: float, finite: _FiniteOrStop, **settings: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        arguments.fp16 = settings.get("fp16", False)
        finite.on_pre_optimizer_step(arguments, None, None, model=model)

    finite = _FiniteOrStop()
    finite.see(examples(7, 1), torch.tensor(0.5))
    finite.see(examples(4), torch.tensor(0.5))
    step(1e30, finite)  # its square is not finite, but it is
    finite.see(examples(3, 0), torch.tensor(0.5))
    with pytest.raises(NonFiniteScoreError, match=r"gradient is not finite.* rows 1, 4,"):
        step(float("inf"), finite)
    step(float("nan"), finite, fp16=True)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteScoreError, match=r"loss is not finite.* rows 3, 10,"):
            finite.see(examples(9, 2), torch.tensor(loss))

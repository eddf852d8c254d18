"""Checkpoints that are whole or do not count, and runs that go on from them.

Decides where a run goes on: at the newest checkpoint whose files are what their manifest says, with
the settings it was made with. The Trainer by itself resumes without a word from a folder that lacks
the optimizer or whose weights end in zeros, trains a finished run for one step more each time, and
deletes an old checkpoint before the new one is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

from qwen3_reranker.errors import InputError, Qwen3RerankerError

from .output import MANIFEST, DamagedError, commit, verify, writing
from .reading import Say

_STATE = "trainer_state.json"
_LENGTH = {"num_train_epochs", "max_steps", "early_stopping_patience"}
"""Settings that decide when a run ends."""


class StoppedError(Qwen3RerankerError):
    """A run was stopped by a signal, after its state was saved.

    Attributes:
        status: Exit status of the process, 128 and the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on.

    Attributes:
        checkpoint: A verified checkpoint.
        changed: Names of settings that are not those it was made with.
    """

    checkpoint: Path
    changed: frozenset[str]

    def ended(self) -> transformers.TrainerState | None:
        """Return the state of training if it ended here; to train on would be a step too many.

        Raises:
            InputError: If it ended with other settings, which nothing would be trained with.
        """
        file = str(self.checkpoint / _STATE)
        state: transformers.TrainerState = transformers.TrainerState.load_from_json(file)
        callbacks: Any = state.stateful_callbacks or {}
        control = callbacks.get("TrainerControl", {})
        has_ended = control.get("args", {}).get("should_training_stop", False)
        if not has_ended or self.changed & _LENGTH:
            return None
        if self.changed:
            raise InputError(
                f"training ended at '{self.checkpoint}', so other settings "
                f"({', '.join(sorted(self.changed))}) would have no effect. Raise "
                "--num_train_epochs to train on with them, or name another --output_dir."
            )
        return state

    def best(self) -> Path | None:
        """Return the checkpoint that scored best so far, which lies beside this one."""
        state = json.loads((self.checkpoint / _STATE).read_bytes())
        name = state.get("best_model_checkpoint")
        return None if name is None else self.checkpoint.parent / Path(name).name


def starting_point(
    output: Path,
    wanted: str | None,
    settings: Mapping[str, Any],
    *,
    allow_changed: bool,
    needs_best: bool,
    say: Say,
) -> Start | None:
    """Return the newest verified checkpoint, or None to start at the first step.

    Args:
        output: The run's folder.
        wanted: "true" for the newest, a checkpoint's folder, or None to start.
        settings: Those of this run.
        allow_changed: Whether to go on although they are not those of the checkpoint.
        needs_best: Whether the run ends with its best state, which must be whole then, too.
        say: Told what is skipped and why.

    Raises:
        InputError: If there is an unfinished run and nothing is wanted, or settings differ.
        DamagedError: If the wanted folder is no whole checkpoint.
    """
    found = _checkpoints(output)
    if wanted is None or wanted.lower() == "false":
        if found:
            raise InputError(
                f"'{output}' holds an unfinished run, up to {found[0].name}. Go on with it by "
                "--resume_from_checkpoint true, or name another --output_dir."
            )
        return None
    takes_newest = wanted.lower() == "true"
    for folder in found if takes_newest else [Path(wanted)]:
        try:
            start = _whole(folder, settings, needs_best)
        except DamagedError as damage:
            if not takes_newest:
                raise InputError(f"{damage}. Pass true for the newest whole one.") from damage
            say(f"Skipped {folder.name}: {damage}.")
            continue
        if start.changed and not allow_changed:
            raise InputError(_other_settings(folder, start.changed))
        say(f"Going on from '{folder}'.")
        return start
    say(f"There is no checkpoint in '{output}' to go on from: starting at the first step.")
    return None


def _whole(folder: Path, settings: Mapping[str, Any], needs_best: bool) -> Start:
    recorded = verify(folder)
    if recorded.get("save_only_model"):
        raise DamagedError(f"'{folder}' has weights only, by --save_only_model")
    start = Start(folder, differences(recorded, settings))
    best = start.best() if needs_best else None
    if best is not None and best.name != folder.name:
        verify(best)
    return start


def is_complete(output: Path, settings: Mapping[str, Any], *, allow_changed: bool) -> bool:
    """Return whether a folder holds all that a run with these settings leaves behind.

    Raises:
        InputError: If it was another run's, or is no longer what that run left.
    """
    if not (output / MANIFEST).exists():
        return False
    try:
        changed = differences(verify(output), settings)
    except DamagedError as damage:
        raise InputError(f"{damage} since the run ended. Name another --output_dir.") from damage
    if changed and not allow_changed:
        raise InputError(_other_settings(output, changed))
    return not changed


def differences(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of settings that differ; one that only a newer version has does not."""
    now = json.loads(json.dumps(settings))
    return frozenset(name for name in recorded.keys() & now if recorded[name] != now[name])


def _other_settings(folder: Path, changed: Iterable[str]) -> str:
    return (
        f"'{folder}' was trained with another {', '.join(sorted(changed))}. Set them as they were, "
        "name another --output_dir, or pass --allow_changed to go on with the new ones."
    )


class StopSignals:
    """Takes the first SIGINT or SIGTERM down as a wish; both do what they did before from then on.

    A signal that the process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, number: int, _: object) -> None:
        self.received = number
        self.__exit__()
        name = signal.Signals(number).name
        # print is not to be used here: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: saving after this step. Once more stops at once.\n".encode())


class Checkpoints(transformers.TrainerCallback):
    """Commits what the Trainer saves, keeps the newest, and stops a run that is asked to.

    Args:
        output: The run's folder.
        settings: What a run that goes on must have, too.
        limit: Checkpoints to keep, the best one among them; None keeps all.
        num_bytes: About what one takes.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        *,
        limit: int | None,
        num_bytes: int,
    ) -> None:
        self._output = output
        self._settings = settings
        self._limit = limit
        self._num_bytes = num_bytes
        self.signals = StopSignals()
        self._stops = False

    @contextmanager
    def saving(
        self, args: transformers.TrainingArguments, state: transformers.TrainerState
    ) -> Iterator[None]:
        """Make a checkpoint of what the block writes, and delete old ones only then.

        Raises:
            WriteError: If the disk is full; older checkpoints are whole then.
        """
        folder = self._output / f"checkpoint-{state.global_step}"
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # what an earlier run left unfinished
        _wait_for_all(args)  # each process writes its random state into it
        with writing(folder, self._num_bytes):
            yield
            _wait_for_all(args)
            if args.should_save:
                names = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
                commit(folder, map(Path.as_posix, names), self._settings)
        if args.should_save and self._limit:
            rotate(folder, state.best_model_checkpoint, self._limit)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint if the run is to stop."""
        if self._is_asked_to_stop(args):
            self._stops = control.should_save = True
        _log_what_is_saved(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log where a checkpoint is written."""
        _log_what_is_saved(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after the checkpoint that was asked for.

        Raises:
            StoppedError: If a signal asked for it.
        """
        if self._stops:
            self._stop(state.global_step)

    def stop_if_saved(self, step: int) -> None:
        """Stop after the last step, at which a signal may have come too late for a checkpoint.

        Raises:
            StoppedError: If a signal asked for it, and there is a checkpoint all the same.
        """
        is_saved = (self._output / f"checkpoint-{step}" / MANIFEST).exists()
        if is_saved and self.signals.received is not None:
            self._stop(step)

    def _stop(self, step: int) -> NoReturn:
        number = self.signals.received or signal.SIGTERM  # another process received it
        raise StoppedError(
            f"Stopped by {signal.Signals(number).name}, saved at step {step}. Go on with the same "
            "command and --resume_from_checkpoint true.",
            number,
        )

    def _is_asked_to_stop(self, args: transformers.TrainingArguments) -> bool:
        """Return whether any process is; a step that not all take would never end."""
        is_asked = self.signals.received is not None
        if args.world_size == 1:
            return is_asked
        asked = torch.tensor(int(is_asked), device=args.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)


def rotate(newest: Path, best: str | None, limit: int) -> None:
    """Delete checkpoints before a committed one, except the best, until `limit` are left."""
    kept = {newest.name} | ({Path(best).name} if best else set())
    older = [each for each in _checkpoints(newest.parent) if _step(each) < _step(newest)]
    for folder in older:
        if len(kept) < limit and (folder / MANIFEST).exists():
            kept.add(folder.name)
        if folder.name not in kept:
            (folder / MANIFEST).unlink(missing_ok=True)  # half of it is no checkpoint
            shutil.rmtree(folder, ignore_errors=True)


def _log_what_is_saved(control: transformers.TrainerControl) -> None:
    # The loss that is summed up between two lines of the log is in no checkpoint.
    control.should_log = control.should_log or control.should_save


def _wait_for_all(args: transformers.TrainingArguments) -> None:
    if args.world_size > 1:
        torch.distributed.barrier()


def _checkpoints(output: Path) -> list[Path]:
    """Return the folders that the Trainer calls checkpoints, newest first."""
    found = [each for each in output.glob("checkpoint-*") if each.is_dir() and _step(each) >= 0]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1

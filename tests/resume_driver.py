"""Runs `qwen3-finetune train` in forked processes, each with a fault at a named point.

Started once by the tests: what takes seconds, importing torch and loading the base, is done before
the forks. Reads one JSON object per line, `{"folder", "argv", "fault"}`, and answers with the exit
status, negative for a signal; what the run printed lies in `FOLDER/log`.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
import transformers
from accelerate.utils.other import extract_model_from_parallel
from transformers.trainer_callback import CallbackHandler, TrainerState

import finetune.checkpoints
import finetune.output
import finetune.train
from finetune.cli import main, parse_training, training_parser
from finetune.trainee import load_trainee
from finetune.trainer import GroupTrainer

Fault = dict[str, Any]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Call `before` and `after` around a function, with its arguments."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **settings: Any) -> Any:
        before(*args)
        result = original(*args, **settings)
        after(*args)
        return result

    setattr(owner, name, wrapped)


def nothing(*_: Any) -> None:
    pass


def if_true(condition: Callable[..., bool]) -> Callable[..., None]:
    return lambda *args: die() if condition(*args) else None


def kill_at(point: str, step: int) -> None:
    """Have the process killed at a named point, in checkpoint `step` or before that step."""
    folder = f"checkpoint-{step}"
    saved = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "rng": "rng_state.pth"}
    if point == "step":
        wrap(
            CallbackHandler, "on_step_begin", if_true(lambda *a: a[2].global_step == step), nothing
        )
    elif point == "model":
        wrap(GroupTrainer, "_save", nothing, if_true(lambda _, to, *a: folder in str(to)))
    elif point in saved:
        path = f"{folder}/{saved[point]}"
        wrap(torch, "save", nothing, if_true(lambda _, to, *a: path in str(to)))
    elif point == "trainer state":
        wrap(TrainerState, "save_to_json", nothing, if_true(lambda _, to: folder in str(to)))
    elif point == "before manifest":
        wrap(finetune.checkpoints, "commit", if_true(lambda at, *a: at.name == folder), nothing)
    elif point in ("manifest written", "manifest renamed"):
        hit = if_true(lambda path, to: to.name == "manifest.json" and path.parent.name == folder)
        hits = (hit, nothing) if point == "manifest written" else (nothing, hit)
        wrap(Path, "replace", *hits)
    elif point == "rotation":
        wrap(shutil, "rmtree", if_true(lambda path, *a: Path(path).is_dir()), nothing)
    elif point == "adapter written":
        wrap(finetune.train, "save_adapter", nothing, if_true(lambda *a: True))
    elif point == "adapter half moved":
        wrap(
            Path, "replace", nothing, if_true(lambda _, to: to.name == "adapter_model.safetensors")
        )
    elif point == "adapter moved":
        wrap(finetune.train, "write_report", if_true(lambda *a: True), nothing)
    else:
        raise ValueError(point)


def fill_disk_at(count: int, output: Path) -> None:
    """Have the `count`-th write below a folder fail as on a full disk, half of it written."""
    writes = 0

    def fail(path: Any, error: Exception) -> None:
        nonlocal writes
        if isinstance(path, int) or output not in Path(path).absolute().parents:
            return
        writes += 1
        if writes == count:
            with original(path, "w") as stump:
                stump.write("half")
            raise error

    full = OSError(errno.ENOSPC, "No space left on device")
    original = builtins.open

    def opened(path: Any, mode: str = "r", *args: Any, **settings: Any) -> Any:
        if set(mode) & set("wax"):
            fail(path, full)
        return original(path, mode, *args, **settings)

    builtins.open = opened
    wrap(Path, "write_text", lambda path, *a: fail(path, full), nothing)
    # torch writes by code of its own, and has its own words for it.
    wrap(torch, "save", lambda _, to, *a: fail(to, RuntimeError("unexpected pos 64")), nothing)
    wrap(peft.peft_model, "safe_save_file", lambda _, to, *a: fail(to, full), nothing)
    wrap(finetune.output, "_sync", lambda path: fail(path, full) if path.is_file() else None,
         nothing)  # fmt: skip


def signal_at(step: int, number: int, times: int) -> None:
    """Send signals to the process in the middle of a step."""

    def send(_: Any, __: Any, state: TrainerState, *rest: Any) -> None:
        if state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    wrap(CallbackHandler, "on_step_begin", send, nothing)


def report(folder: Path, content: Any) -> None:
    for name in ("report.json", "report.html"):
        (folder / name).write_text(json.dumps(content.history), encoding="utf-8")


def run(job: dict[str, Any]) -> int:
    """Train in this process, which is a fork."""
    os.chdir(job["folder"])
    fault = job.get("fault", {})
    if "kill" in fault:
        kill_at(fault["kill"], fault.get("step", 0))
    if "write" in fault:
        fill_disk_at(fault["write"], Path("run").absolute())
    if "signal" in fault:
        signal_at(fault["step"], fault["signal"], fault.get("times", 1))
    return main(["train", *job["argv"]])


def answer(job: dict[str, Any]) -> int:
    """Fork, run, and return the exit status."""
    child = os.fork()
    if child == 0:
        log = os.open(Path(job["folder"], "log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 70
        try:
            status = run(job)
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve(argv: list[str]) -> None:
    """Answer jobs until the input ends; `argv` names a base as the jobs do."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    torch.set_num_threads(1)
    _, base, training = parse_training(training_parser(), argv)
    transformers.set_seed(0)
    trainee = load_trainee(base, device=training.device, template=None)
    finetune.train.load_trainee = lambda *_, **__: trainee  # type: ignore[attr-defined]
    # What the other tests of training have, and takes most of the time.
    finetune.train._check_reloaded = nothing  # type: ignore[assignment]
    finetune.train.compare_sets = lambda *_, **__: []  # type: ignore[attr-defined]
    finetune.train.write_report = report  # type: ignore[attr-defined]
    extract_model_from_parallel(torch.nn.Linear(1, 1))  # imports DeepSpeed where it is installed
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps({"status": answer(json.loads(line))}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])

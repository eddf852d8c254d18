"""KeyboardInterrupt at every place of a call where something could be held, and at random ones."""

from __future__ import annotations

import _thread
import dis
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from finetune.output import hash_file
from qwen3_reranker import Reranker
from qwen3_reranker.embedded import embedded_folder
from tests import fakes
from tests.attacks.limits import bounded
from tests.fakes import FRUIT, QUERY

pytestmark = pytest.mark.attack

_WATCHED = ("qwen3_reranker", "threading.py", "queue.py", os.sep + "concurrent" + os.sep)
"""Parts of the names of files in which a caller could hold what another thread waits for."""
_LEFT_OUT = ("tokenization.py", "prompt.py", "results.py", "inputs.py", "calibration.py")
"""Of those, files that hold nothing."""


_CHECKING = {"CALL", "CALL_FUNCTION_EX", "CALL_KW", "PRECALL", "RESUME", "JUMP_BACKWARD"}
"""Instructions after which the interpreter looks whether a signal has come."""


class _InterruptAt:
    """Raises KeyboardInterrupt at the k-th place of this thread where a signal could.

    Not before any instruction: between a lock's acquisition by `with` and the block, for one, no
    signal is looked for.
    """

    def __init__(self, k: int) -> None:
        self.left = k
        self.has_raised = False
        self._last: dict[FrameType, str] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not any(part in name for part in _WATCHED) or name.endswith(_LEFT_OUT):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "return":
            self._last.pop(frame, None)
        if event == "opcode":
            instruction = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            last = self._last.get(frame, "RESUME")
            self._last[frame] = instruction
            if last in _CHECKING and instruction != "CALL" and not self.has_raised:
                self.left -= 1
                if self.left <= 0:
                    self.has_raised = True
                    raise KeyboardInterrupt
        return self


def _interrupted(call: Callable[[], object], k: int) -> bool:
    """Run a call with an interrupt at its k-th place; say whether there was such a place."""
    tracer = _InterruptAt(k)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return tracer.has_raised


class _Forgetful(fakes.FakeNetwork):
    """Keeps no packs, of which there are too many."""

    def score(self, pack: Any) -> Any:
        self.packs.clear()
        return super().score(pack)


def _answers_in_time(reranker: Reranker, seconds: float = 5) -> bool:
    """Say whether another thread's call is scored."""
    scores: list[list[float]] = []
    other = threading.Thread(target=lambda: scores.append(reranker.score(QUERY, FRUIT)))
    other.daemon = True
    other.start()
    other.join(seconds)
    return len(scores) == 1 and len(scores[0]) == len(FRUIT)


@pytest.mark.parametrize("is_watched", [False, True], ids=["plain", "with a bar"])
def test_interrupt_anywhere_in_a_call_wedges_nothing(
    monkeypatch: pytest.MonkeyPatch, tried: Callable[[int], None], is_watched: bool
) -> None:
    monkeypatch.setattr("qwen3_reranker.waiting._is_watched", lambda: is_watched)
    k = 0
    with fakes.loaded(monkeypatch, fakes.FakeModel(_Forgetful())):
        reranker = Reranker("model")
        expected = reranker.score(QUERY, FRUIT)
        with bounded(seconds=300, megabytes=100):
            while _interrupted(lambda: reranker.rank(QUERY, FRUIT, timeout_s=20), k + 1):
                k += 1
                assert _answers_in_time(reranker), f"no answer after an interrupt at place {k}"
        assert reranker.score(QUERY, FRUIT) == expected
    assert k > 100
    tried(k)


def test_interrupts_at_random_moments_wedge_nothing(
    monkeypatch: pytest.MonkeyPatch, tried: Callable[[int], None]
) -> None:
    """Real signals, as Ctrl-C sends them, while the main thread is at whatever it is at."""
    count, chance = 10_000, random.Random(0)
    with fakes.loaded(monkeypatch, fakes.FakeModel(_Forgetful())):
        reranker = Reranker("model")
        expected = reranker.score(QUERY, FRUIT)
        stop, foreign, interrupts = threading.Event(), [], 0

        def interrupt() -> None:
            while not stop.is_set():
                time.sleep(chance.uniform(0, 0.004))
                if not stop.is_set():
                    _thread.interrupt_main()

        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        sender = threading.Thread(target=interrupt, daemon=True)
        try:
            with bounded(seconds=300, megabytes=100):
                sender.start()
                while interrupts < count:
                    try:
                        while True:
                            assert reranker.score(QUERY, FRUIT, timeout_s=30) == expected
                    except KeyboardInterrupt:
                        interrupts += 1
                    except Exception as error:  # whatever else reaches a caller
                        foreign.append(error)
                        interrupts += 1
        finally:
            stopped = False
            while not stopped:  # the last interrupt may come while this is being done
                try:
                    stop.set()
                    sender.join()
                    signal.signal(signal.SIGINT, previous)
                    stopped = True
                except KeyboardInterrupt:
                    continue
        assert foreign == []
        assert _answers_in_time(reranker)
    tried(interrupts)


def test_conversion_that_was_killed_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    """It left up to 540 MB in the user's cache for good."""
    cache = tmp_path / "qwen3-reranker"
    command = [
        sys.executable,
        "-c",
        "from qwen3_reranker import embedded; embedded.embedded_folder()",
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def written() -> int:
        return sum(file.stat().st_size for file in cache.rglob("model.safetensors"))

    with subprocess.Popen(command, env=environment) as process:
        while written() < 10_000_000:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.kill()
    assert written() > 0
    assert not list(cache.glob("smollm2-*")), "it was done before it could be killed"
    subprocess.run(command, env=environment, check=True)
    (model,) = cache.iterdir()
    for file in embedded_folder().iterdir():
        assert hash_file(model / file.name) == hash_file(file)

"""KeyboardInterrupt at every place of a call where something could be held, and at random ones."""

from __future__ import annotations

import _thread
import dis
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_WATCHED = ("qwen3_reranker", "threading.py", "queue.py", os.sep + "concurrent" + os.sep)
"""Parts of the names of files in which a caller could hold what another thread waits for."""
_LEFT_OUT = (
    "tokenizer.py", "prompt.py", "strings.py", "results.py", "arguments.py", "calibration.py",
)  # fmt: skip
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


def interrupted(call: Callable[[], object], k: int) -> bool:
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


def interrupt_at_random(call: Callable[[], object], count: int) -> list[Exception]:
    """Repeat a call while real signals come, as Ctrl-C sends them; return what else it raised."""
    chance, foreign, interrupts, stop = random.Random(0), list[Exception](), 0, threading.Event()

    def interrupt() -> None:
        while not stop.is_set():
            time.sleep(chance.uniform(0, 0.004))
            if not stop.is_set():
                _thread.interrupt_main()

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    sender = threading.Thread(target=interrupt, daemon=True)
    try:
        sender.start()
        while interrupts < count:
            try:
                while True:
                    call()
            except KeyboardInterrupt:
                interrupts += 1
            except Exception as error:
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
    return foreign

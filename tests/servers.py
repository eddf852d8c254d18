"""Servers as their users start them, each a process of its own on a free loopback port."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from qwen3_reranker.cli.vllm_command import vllm_command

ROOT = Path(__file__).parents[1]
COMPAT_PYTHON = Path(os.environ.get("COMPAT_PYTHON", ROOT / ".venv/compat/bin/python"))
"""Interpreter of the environment with other people's clients and servers; `make compat`."""
VLLM_PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv/vllm/bin/python"))
"""Interpreter of the environment with vLLM for CPUs; `make vllm`."""
VLLM_ENVIRONMENT = {
    **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip

_START_S = 60
_VLLM_START_S = 400  # it imports for half a minute, on a machine that does nothing else


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs.

    Attributes:
        url: Its address.
        process: Its process.
        log_file: What it has written.
    """

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def log(self) -> str:
        """Return what it has written so far."""
        return self.log_file.read_text()


@contextmanager
def serving(
    model: str | Path, *options: str, command: Sequence[str] = (), api_key: str | None = None
) -> Iterator[Server]:
    """Run `qwen3-reranker serve` until the block ends; it is ready to score then.

    Args:
        model: Folder of a checkpoint.
        options: Further options.
        command: What stands before "serve"; this interpreter's module if empty.
        api_key: Key of its clients, in the environment.
    """
    command = command or (sys.executable, "-m", "qwen3_reranker")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("QWEN3_RERANKER_API_KEY", None)
    if api_key is not None:
        environment["QWEN3_RERANKER_API_KEY"] = api_key
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    arguments = [*command, "serve", str(model), "--port", "0", *options]
    with _running(arguments, environment, "/ready", headers) as server:
        yield server


@contextmanager
def web_page(*arguments: str, command: Sequence[str] = ()) -> Iterator[Server]:
    """Run `qwen3-reranker ui` until the block ends; the page can be opened then.

    Args:
        arguments: What stands after "ui".
        command: As in `serving`.
    """
    command = command or (sys.executable, "-m", "qwen3_reranker")
    with _running([*command, "ui", "--port", "0", *arguments], {**os.environ}, "/", {}) as server:
        yield server


@contextmanager
def _running(
    arguments: Sequence[str], environment: dict[str, str], path: str, headers: dict[str, str]
) -> Iterator[Server]:
    """Run a server until the block ends; its path answers with 200 then."""
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                arguments, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        try:
            url = _url(process, log_file)
            _wait(lambda: httpx.get(f"{url}{path}", headers=headers).status_code == 200, process)
            yield Server(url, process, log_file)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def vllm(model: Path, *options: str) -> Iterator[str]:
    """Run what `qwen3-reranker vllm-command` prints, on a CPU, until the block ends.

    Args:
        model: Folder of a checkpoint.
        options: Further options.

    Yields:
        Its address.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, *words = shlex.split(vllm_command(str(model), port=port))
    command = [str(VLLM_PYTHON.parent / "vllm"), *words, "--dtype", "float32", "--enforce-eager"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *options], stdout=log, stderr=subprocess.STDOUT, env=VLLM_ENVIRONMENT,
            start_new_session=True,
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(lambda: _is_healthy(url), process, _VLLM_START_S)
            yield url
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(log.read()[-5000:].decode()) from error
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def llama_cpp(file: Path, api_key: str | None = None) -> Iterator[str]:
    """Run llama.cpp's server on a GGUF file until the block ends; yield its address."""
    script = str(ROOT / "tests/compat/llama_server.py")
    process = subprocess.Popen(
        [str(COMPAT_PYTHON), script, str(file), *([api_key] if api_key else [])],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        yield next(line.strip() for line in lines if line.startswith("http"))
    finally:
        process.kill()
        process.communicate()


def _url(process: subprocess.Popen[bytes], log_file: Path) -> str:
    found: list[str] = []

    def is_listening() -> bool:
        found[:] = re.findall(r"running on (http://\S+)", log_file.read_text())
        return bool(found)

    try:
        _wait(is_listening, process)
    except RuntimeError as error:
        raise RuntimeError(log_file.read_text()) from error
    return found[0]


def _wait(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = _START_S
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the server did not start")
        time.sleep(0.02)

"""What the benchmarks share: texts of known length, counted tokens, a machine described.

Decides how lengths are spread and how a token is counted. Knows nothing of what is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qwen3_reranker.model.cpu_trials import bfloat16_pays


class DisagreementError(Exception):
    """Contenders compute different things, or the workload could not show it if they did."""


def one_token_words(tokenizer: Tokenizer) -> list[str]:
    """Return the words that are one token each after a space, sorted."""
    # "Ġ" is how byte-level vocabularies write a leading space.
    after_space = (token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ")
    return sorted(word for word in after_space if word.isascii() and word.isalpha())


def spread_lengths(
    count: int, *, median: float, sigma: float, shortest: int, longest: int
) -> NDArray[np.int64]:
    """Return the quantiles of a log-normal distribution, so that few show its shape too."""
    normal = NormalDist(np.log(median), sigma)
    quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    lengths: NDArray[np.int64] = np.exp(quantiles).clip(shortest, longest).round().astype(int)
    return lengths


def count_tokens(model: Any) -> Callable[[], int]:
    """Count ids, padding included, where they enter a transformers model.

    At the embedding, because sentence-transformers calls `forward`, which runs no hooks.
    """
    total = 0

    def count(module: Any, args: tuple[torch.Tensor]) -> None:
        nonlocal total
        total += args[0].numel()

    model.get_input_embeddings().register_forward_pre_hook(count)
    return lambda: total


def describe_machine(packages: Sequence[str]) -> str:
    """Return a line for the hardware and one for the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpus = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    compared = "faster" if bfloat16_pays() else "no faster"
    return (
        f"{cpus[0] if cpus else platform.processor()}, {len(cpus) or '?'} cores, "
        f"torch threads: {torch.get_num_threads()}, bfloat16 {compared}\n"
        f"Python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}"
    )


def read_clock(device: str) -> float:
    """Return seconds: the process's own on CPU, on CUDA the wall's when all work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)` as a fresh interpreter computes it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def resident_bytes(field: str, process: int | str = "self") -> int:
    """Return a size of a process from the kernel: VmRSS, or its peak VmHWM."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(field))
    return 1024 * int(kilobytes)


def peak_memory(run: Callable[..., object], batch: Any, device: str) -> float:
    """Return the greatest size in MB of a process that runs this; for a process of its own."""
    run(batch)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")
    return peak / 1e6


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every timed benchmark."""
    parser.add_argument("--rounds", type=int, default=5)
    # Waiting threads spin, and process time counts that as work: one thread measures work alone.
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="where checkpoints lie for the time being")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")


def write_measurements(
    file: Path | None, conditions: Sequence[str], results: Sequence[Any]
) -> None:
    """Write dataclasses and what they were measured under, if a file is wanted."""
    if file is not None:
        raw = {"conditions": list(conditions), "results": [asdict(result) for result in results]}
        file.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

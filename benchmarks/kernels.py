"""Memory of the kernels that oneDNN keeps for sizes it has seen, and the time that they save.

    python -m benchmarks.kernels

A server sees packs of all sizes. Multiplies one layer's matrices of Qwen3-Reranker-0.6B by inputs
of random lengths, in a process for each capacity of the caches: the reason for `web/memory.py`.
Random numbers, CPU seconds. Knows nothing of requests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.real_parts import QWEN3_0_6B

from .workload import describe_machine, resident_bytes

_LONGEST = 512
_NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def measure(dtype: torch.dtype, sizes: int, seed: int) -> tuple[float, float]:
    """Return MB that the process grows by, and milliseconds of a layer whose size is new to it."""
    torch.set_num_threads(1)
    hidden, wide = QWEN3_0_6B["hidden_size"], QWEN3_0_6B["intermediate_size"]
    inner = QWEN3_0_6B["num_attention_heads"] * QWEN3_0_6B["head_dim"]
    shapes = [(inner, hidden), (hidden, inner), (wide, hidden), (hidden, wide)]
    weights = [torch.ops.mkldnn._reorder_linear_weight(torch.ones(s, dtype=dtype)) for s in shapes]
    inputs = [torch.ones(_LONGEST, columns, dtype=dtype) for _, columns in shapes]
    lengths = torch.randint(32, _LONGEST, (sizes,), generator=torch.Generator().manual_seed(seed))
    started = resident_bytes("VmRSS")
    first, again = 0.0, 0.0
    for length in lengths.tolist():
        for is_first in (True, False):
            before = time.process_time()
            for weight, rows in zip(weights, inputs, strict=True):
                torch.ops.mkldnn._linear_pointwise(rows[:length], weight, None, "none", [], "")
            seconds = time.process_time() - before
            first, again = (first + seconds, again) if is_first else (first, again + seconds)
    return (resident_bytes("VmRSS") - started) / 1e6, 1000 * (first - again) / sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Measure with both capacities and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sizes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help="measure in this process, as it is set")
    args = parser.parse_args(argv)
    if args.one:
        with torch.inference_mode():
            print(json.dumps(measure(getattr(torch, args.dtype), args.sizes, args.seed)))
        return 0
    print(describe_machine(("torch",)))
    print("| kernels kept | grows by, MB | a new size costs a layer, ms |\n|---|---|---|")
    for kept in ("1024", "64"):
        command = [sys.executable, "-m", "benchmarks.kernels", "--one", "--dtype", args.dtype]
        command += ["--sizes", str(args.sizes), "--seed", str(args.seed)]
        environment = {**os.environ, **dict.fromkeys(_NAMES, kept)}
        done = subprocess.run(  # noqa: S603
            command, env=environment, check=True, capture_output=True, text=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        grown, cost = json.loads(done.stdout)
        print(f"| {kept} | {grown:.0f} | {cost:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

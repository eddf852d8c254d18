"""How time and memory grow: with documents, with a document's length, with callers at once.

    python -m benchmarks.growth --plot growth.png

Decides the sizes. The network is tiny, so that what is seen is the package's own cost and not that
of multiplications; `benchmarks.speed` has the real widths. Each size runs in a process of its own,
whose greatest resident size is its memory.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from tokenizers import Tokenizer

from qwen3_reranker import Reranker
from tests.real_parts import qwen3_tokenizer_file, save_random_qwen3

from .workload import (
    add_run_options,
    describe_machine,
    in_new_process,
    one_token_words,
    resident_bytes,
    write_measurements,
)

SIZES = {
    "documents": [10, 100, 1000, 10_000],
    "length": [30, 120, 500, 2000, 8000, 32_000],
    "callers": [1, 4, 16, 64],
    "query": [15, 250, 1000, 4000],
}
"""Documents of 40 tokens; tokens of one document; threads with 5 documents each; tokens of a query
before 500 documents of 60 tokens."""


@dataclass(frozen=True, slots=True)
class Point:
    """What one size cost: wall seconds, and the process's greatest resident size."""

    series: str
    size: int
    seconds: float
    peak_mb: float


def measure(folder: str, series: str, size: int, threads: int, rounds: int) -> Point:
    """Return a size's cost, for a process of its own."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    words = one_token_words(Tokenizer.from_file(str(qwen3_tokenizer_file())))

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    reranker = Reranker(folder, dtype="float32", device="cpu", max_length=40_000)
    reranker.score("warm up", [text(30)] * 2)
    seconds = []
    for _ in range(rounds):
        query = text(size if series == "query" else 15)
        if series == "callers":
            jobs = [[text(40) for _ in range(5)] for _ in range(size)]
        else:
            lengths = {
                "documents": [40] * size, "length": [size], "query": [60] * 500,
            }[series]  # fmt: skip
            jobs = [[text(length) for length in lengths]]
        with ThreadPoolExecutor(len(jobs)) as pool:
            start = perf_counter()
            list(pool.map(lambda documents: reranker.score(query, documents), jobs))  # noqa: B023
            seconds.append(perf_counter() - start)
    return Point(series, size, min(seconds), resident_bytes("VmHWM") / 1e6)


def save_plot(file: Path, points: Sequence[Point], title: str) -> None:
    """Draw seconds and memory of each series, both on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    rows = figure.subplots(2, len(SIZES), sharex="col")
    for column, series in enumerate(SIZES):
        mine = [point for point in points if point.series == series]
        sizes = [point.size for point in mine]
        rows[0, column].loglog(sizes, [point.seconds for point in mine], marker="o")
        rows[1, column].loglog(sizes, [point.peak_mb for point in mine], marker="o", color="C1")
        rows[1, column].set_xlabel(series)
        rows[1, column].set_ylim(100, 10_000)
    rows[0, 0].set_ylabel("seconds")
    rows[1, 0].set_ylabel("peak MB")
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and draw."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--series", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a chart here")
    add_run_options(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    conditions = [
        f"$ {shlex.join(['python', '-m', 'benchmarks.growth', *argv])}",
        *describe_machine(("torch", "transformers")).splitlines(),
    ]
    print("\n".join(conditions), flush=True)
    print("\n| series | size | seconds | peak MB |\n|---|---|---|---|")
    points = []
    with tempfile.TemporaryDirectory(dir=args.workdir) as folder:
        save_random_qwen3(Path(folder), seed=args.seed)
        for series in args.series:
            for size in SIZES[series]:
                point = in_new_process(measure, folder, series, size, args.threads, args.rounds)
                points.append(point)
                print(
                    f"| {series} | {size} | {point.seconds:.3f} | {point.peak_mb:.0f} |", flush=True
                )
    write_measurements(args.json, conditions, points)
    if args.plot is not None:
        save_plot(args.plot, points, f"tiny network; {conditions[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

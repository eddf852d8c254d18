"""Our server and llama.cpp's under load: documents per second and waits against concurrency.

    make compat && python -m benchmarks.server_load

Decides the load: clients that each send a query with 5 documents and wait for the answer, at
several concurrencies, over HTTP on this machine. Both servers have the same float32 weights and as
many threads for the model; before anything is timed, their scores are compared. Without the
environment of `make compat` ours runs alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from tokenizers import Tokenizer

from finetune.gguf_export import FILE, write_gguf
from finetune.whole import load_whole
from tests.real_parts import QWEN3_0_6B, qwen3_tokenizer_file, save_random_qwen3
from tests.servers import COMPAT_PYTHON, llama_cpp, serving

from .workload import (
    DisagreementError,
    add_run_options,
    describe_machine,
    one_token_words,
    write_measurements,
)

DOCUMENTS = 5
TOKENS = 60
TOLERANCE = 5e-3
"""Of P("yes"): far above rounding, far below what another prompt does."""


@dataclass(slots=True)
class Result:
    """One server at one concurrency."""

    server: str
    widths: str
    concurrency: int
    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one server."""

    client: httpx.Client
    bodies: list[dict[str, object]]

    def ask(self, body: dict[str, object]) -> float:
        """Send a request and return the seconds until its answer."""
        started = time.perf_counter()
        self.client.post("/v1/rerank", json=body).raise_for_status()
        return time.perf_counter() - started

    def scores(self) -> list[float]:
        """Return the scores of the first request, in the order of its documents."""
        reply = self.client.post("/v1/rerank", json=self.bodies[0]).raise_for_status()
        rows = sorted(reply.json()["results"], key=lambda row: row["index"])
        return [row["relevance_score"] for row in rows]


def draw_bodies(count: int, seed: int) -> list[dict[str, object]]:
    """Draw requests of words that are one token each."""
    rng = np.random.default_rng(seed)
    words = one_token_words(Tokenizer.from_file(str(qwen3_tokenizer_file())))

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    return [
        {"query": text(12), "documents": [text(TOKENS) for _ in range(DOCUMENTS)]}
        for _ in range(count)
    ]


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """Start both servers on a checkpoint; yield their addresses by name."""
    with ExitStack() as stack:
        options = ("--dtype", "float32", "--device", "cpu")
        urls = {"ours": stack.enter_context(serving(folder, *options)).url}
        if COMPAT_PYTHON.exists():
            write_gguf(load_whole(str(folder), None), folder)
            urls["llama.cpp"] = stack.enter_context(llama_cpp(folder / FILE))
        yield urls


def measure(loads: dict[str, Load], widths: str, concurrency: int, rounds: int) -> list[Result]:
    """Time all requests of each server, so many at a time, one server after the other."""
    waits: dict[str, list[float]] = {name: [] for name in loads}
    seconds = dict.fromkeys(loads, 0.0)
    for _ in range(rounds):
        for name, load in loads.items():
            with ThreadPoolExecutor(concurrency) as pool:
                started = time.perf_counter()
                waits[name] += pool.map(load.ask, load.bodies)
                seconds[name] += time.perf_counter() - started
    return [
        Result(
            name,
            widths,
            concurrency,
            DOCUMENTS * len(waits[name]) / seconds[name],
            *(float(1000 * np.quantile(waits[name], q)) for q in (0.5, 0.95, 0.99)),
        )
        for name in loads
    ]


def check_agreement(loads: dict[str, Load]) -> None:
    """Refuse to time servers that compute different things."""
    scores = {name: load.scores() for name, load in loads.items()}
    ours = scores["ours"]
    if max(ours) - min(ours) < 10 * TOLERANCE:
        raise DisagreementError("the scores hardly differ, so a wrong prompt would go unseen")
    for name, found in scores.items():
        if not np.allclose(found, ours, atol=TOLERANCE):
            raise DisagreementError(f"{name} scores otherwise: {found} where ours are {ours}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_load", description=__doc__)
    parser.add_argument("--widths", nargs="+", choices=("tiny", "0.6b"), default=["tiny", "0.6b"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=48, help="per server and round")
    add_run_options(parser)
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    conditions = [
        f"$ {shlex.join(['python', '-m', 'benchmarks.server_load', *argv])}",
        *describe_machine(("torch", "transformers", "fastapi", "uvicorn")).splitlines(),
        f"{args.layers} layers, {args.rounds} rounds of {args.requests} requests x {DOCUMENTS} "
        f"documents of {TOKENS} tokens, {args.threads} thread per model",
    ]
    print("\n".join(conditions), flush=True)
    print("\n| widths | concurrency | server | documents/s | p50 ms | p95 ms | p99 ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    results: list[Result] = []
    for widths in args.widths:
        shape = QWEN3_0_6B if widths == "0.6b" else {}
        with tempfile.TemporaryDirectory(dir=args.workdir) as name, ExitStack() as stack:
            folder = Path(name)
            save_random_qwen3(folder, seed=args.seed, **{**shape, "num_hidden_layers": args.layers})
            urls = stack.enter_context(servers(folder))
            bodies = draw_bodies(args.requests, args.seed)
            loads = {
                name: Load(stack.enter_context(httpx.Client(base_url=url, timeout=600)), bodies)
                for name, url in urls.items()
            }
            check_agreement(loads)
            for concurrency in args.concurrency:
                measured = measure(loads, widths, concurrency, args.rounds)
                results += measured
                for result in measured:
                    print(
                        f"| {widths} | {concurrency} | {result.server} | {result.per_second:.1f} "
                        f"| {result.p50_ms:.0f} | {result.p95_ms:.0f} | {result.p99_ms:.0f} |",
                        flush=True,
                    )
    write_measurements(args.json, conditions, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Many callers at once: the engine beside a lock, and beside threads that nothing holds back.

    python -m benchmarks.load

Decides the load. 32 callers have a query with 5 documents each; they share an instruction, or each
has its own. All contenders use the same network, tokenizer and plan, and are compared by documents
per second of wall time, interleaved, in the median. Then a long job runs and short calls come in:
how long each waits, in times of a forward.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from tokenizers import Tokenizer

from qwen3_reranker import Reranker
from qwen3_reranker.engine.engine import PackRecord
from qwen3_reranker.engine.packing import build_pack, merge_duplicates, plan_packs
from tests.real_parts import QWEN3_0_6B, qwen3_tokenizer_file, save_random_qwen3

from .workload import add_run_options, describe_machine, one_token_words, write_measurements

CALLERS = 32
DOCUMENTS = 5
TOKENS = 120
_SHORT_CALLS = 40


@dataclass(slots=True)
class Result:
    """Documents per second of one contender, per round."""

    contender: str
    instructions: str
    per_second: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Call:
    """What one caller asks."""

    query: str
    documents: list[str]
    instruction: str


def draw_calls(count: int, seed: int, *, share: bool) -> list[Call]:
    """Draw calls of words that are one token each."""
    rng = np.random.default_rng(seed)
    words = one_token_words(Tokenizer.from_file(str(qwen3_tokenizer_file())))

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    common = text(15)
    return [
        Call(text(15), [text(TOKENS) for _ in range(DOCUMENTS)], common if share else text(15))
        for _ in range(count)
    ]


def by_hand(reranker: Reranker, call: Call) -> list[float]:
    """Score a call in the caller's own thread, by the core's parts, without the engine."""
    loaded = reranker.loaded
    group = loaded.tokenizer.encode_group(
        call.instruction, call.query, call.documents, max_length=8192
    )
    groups, _ = merge_duplicates([group])
    scores = np.zeros(len(call.documents), np.float32)
    for seats in plan_packs(groups, loaded.budget):
        pack = build_pack(groups, seats, backend=loaded.backend)
        scores[list(seats[0].documents)] = loaded.network.score(pack)
    return scores.tolist()


def measure(reranker: Reranker, seed: int, rounds: int, *, share: bool) -> list[Result]:
    """Time all callers with each contender, in a new order each round."""
    lock = threading.Lock()

    def locked(call: Call) -> None:
        with lock:
            by_hand(reranker, call)

    contenders: dict[str, Callable[[Call], object]] = {
        "engine": lambda call: reranker.score(
            call.query, call.documents, instruction=call.instruction
        ),
        "lock": locked,
        "unsynchronised": lambda call: by_hand(reranker, call),
    }
    named = "shared" if share else "each its own"
    results = {name: Result(name, named) for name in contenders}
    rng = np.random.default_rng(seed)
    for number in range(rounds):
        calls = draw_calls(CALLERS, seed + number, share=share)
        for name in rng.permutation(list(contenders)).tolist():
            with ThreadPoolExecutor(CALLERS) as pool:
                start = time.perf_counter()
                list(pool.map(contenders[name], calls))
                seconds = time.perf_counter() - start
            results[name].per_second.append(CALLERS * DOCUMENTS / seconds)
    return list(results.values())


def measure_waiting(reranker: Reranker, job_documents: int, seed: int) -> tuple[float, float]:
    """Return the 95th percentile of short calls' waits in times of a forward, and that forward."""
    records: list[PackRecord] = []
    reranker.observe(records.append)
    words = draw_calls(1, seed, share=True)[0].documents[0].split()
    rng = np.random.default_rng(seed)
    job = [" ".join(rng.permutation(words)) for _ in range(job_documents)]
    short = draw_calls(_SHORT_CALLS, seed + 1, share=True)
    runner = threading.Thread(target=_score_job, args=(reranker, job), daemon=True)
    runner.start()
    while not records:
        time.sleep(0.01)
    for call in short:
        time.sleep(float(rng.uniform(0, 0.3)))
        reranker.score(call.query, call.documents, instruction=call.instruction)
    forward = median(record.run_s for record in records)
    waits = [record.wait_s for record in records[1:] if record.wait_s]
    reranker.close()  # what is left of the job is of no interest
    return quantiles(waits, n=20)[-1] / forward, forward


def _score_job(reranker: Reranker, job: Sequence[str]) -> None:
    try:
        reranker.score("a long job", job)
    except Exception as error:
        if type(error).__name__ != "ClosedError":
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--widths", choices=("0.6b", "tiny"), default="0.6b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--job", type=int, default=10_000, help="documents of the long job")
    add_run_options(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    conditions = [
        f"$ {shlex.join(['python', '-m', 'benchmarks.load', *argv])}",
        *describe_machine(("torch", "transformers")).splitlines(),
        f"{args.widths} widths x {args.layers} layers, {CALLERS} callers x {DOCUMENTS} documents "
        f"of {TOKENS} tokens",
    ]
    print("\n".join(conditions), flush=True)
    shape = QWEN3_0_6B if args.widths == "0.6b" else {}
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=args.workdir) as folder:
        settings = {**shape, "num_hidden_layers": args.layers}
        save_random_qwen3(Path(folder), dtype=args.dtype, seed=args.seed, **settings)
        reranker = Reranker(folder, dtype=args.dtype, device=args.device)
        for share in (False, True):
            results += measure(reranker, args.seed, args.rounds, share=share)
        print("\n| instructions | contender | documents/s | times the lock |\n|---|---|---|---|")
        for result in results:
            lock = next(
                r for r in results
                if r.contender == "lock" and r.instructions == result.instructions
            )  # fmt: skip
            ratio = median(a / b for a, b in zip(result.per_second, lock.per_second, strict=True))
            print(
                f"| {result.instructions} | {result.contender} | {median(result.per_second):.2f} "
                f"| {ratio:.2f} |"
            )
        waited, forward = measure_waiting(reranker, args.job, args.seed)
    print(
        f"\nBeside a job of {args.job} documents, {_SHORT_CALLS} calls with {DOCUMENTS}: waits of "
        f"{waited:.2f} forwards (95th percentile), a forward {forward:.2f} s"
    )
    write_measurements(args.json, conditions, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

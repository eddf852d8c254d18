"""The measurements behind constants of the CPU: packs, attention, strips and sizes of matrices.

Decides nothing itself; prints what `loading._CPU_BATCH_TOKENS`, `layers._STRIP`,
`cpu_trials.size_step` and the choices of `attention_cpu` were made by. Random weights and ids,
process CPU seconds, minimum of interleaved rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

from qwen3_reranker.engine.packing import Budget, Group, Pack, build_pack, plan_packs
from qwen3_reranker.model import attention_cpu, layers
from qwen3_reranker.model.loading import load_model
from qwen3_reranker.model.prepacked import prepacked
from tests.real_parts import QWEN3_0_6B, save_random_qwen3

from .workload import resident_bytes

BUDGETS = (512, 1024, 2048, 4096, 8192)
SHAPES = (
    (75, 39),
    (75, 130),
    (75, 500),
    (75, 2000),
    (1000, 60),
    (1000, 2000),
    (0, 700),
    (0, 4000),
)
NEW_LENGTHS, NEW_ROWS = 2000, 500
STRIPS = (2**13, 2**15, 2**17, 2**19, 2**30)
HEADS, KEY_HEADS, HEAD_SIZE = 16, 8, 128
HIDDEN, INTERMEDIATE = 1024, 3072


def fastest(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least CPU seconds of each contender, taken in turn."""
    least = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def measure_budgets(rounds: int, num_documents: int) -> None:
    """Print the cost of one query's documents by the token budget of a pack."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(110), 0.6, num_documents), 40, 400).astype(int)

    def draw(length: int) -> np.ndarray:
        return rng.integers(0, 150_000, length).astype(np.int32)

    groups = [Group(draw(75), [draw(length + 9) for length in lengths])]
    with tempfile.TemporaryDirectory() as folder:
        save_random_qwen3(Path(folder), num_hidden_layers=4, **QWEN3_0_6B)
        network = load_model(folder, dtype="float32", device="cpu").network
    packs: dict[str, list[Pack]] = {
        str(budget): [
            build_pack(groups, seats, backend="documents")
            for seats in plan_packs(groups, Budget(budget))
        ]
        for budget in BUDGETS
    }
    least = fastest(
        {name: lambda row=row: [network.score(p) for p in row] for name, row in packs.items()},
        rounds,
    )
    print(f"\n{num_documents} documents, 4 layers of 0.6B widths, float32")
    print("budget  packs  tokens  CPU s")
    for name, row in packs.items():
        tokens = sum(len(pack.token_ids) for pack in row)
        print(f"{name:>6}  {len(row):5d}  {tokens:6d}  {least[name]:5.2f}")


def measure_attention(rounds: int, dtype: torch.dtype) -> None:
    """Print what one document's attention costs in a layer, by length and way."""
    print(f"\n{dtype}, CPU ms per call\nbefore  document   masked  maskless    blocks")
    generator = torch.Generator().manual_seed(0)

    def by_kernel(skips: bool, *tensors: torch.Tensor) -> None:
        with patch.object(attention_cpu, "_skips_mask", lambda before, length: skips):
            attention_cpu.tail_by_kernel(*tensors, HEAD_SIZE**-0.5)

    for before, length in SHAPES:
        query, key, value = (
            torch.randn(1, tokens, heads, HEAD_SIZE, generator=generator).transpose(1, 2).to(dtype)
            for tokens, heads in (
                (length, HEADS), (before + length, KEY_HEADS), (before + length, KEY_HEADS)
            )
        )  # fmt: skip
        ways = {
            "masked": partial(by_kernel, False, query, key, value),
            "maskless": partial(by_kernel, True, query, key, value),
            "blocks": partial(attention_cpu.tail_in_blocks, query, key, value, HEAD_SIZE**-0.5),
        }
        times = "  ".join(f"{1e3 * seconds:8.1f}" for seconds in fastest(ways, rounds).values())
        print(f"{before:6d}  {length:8d} {times}", flush=True)


def measure_strips(rounds: int, dtype: torch.dtype) -> None:
    """Print what norms and rotations of 2,000 tokens cost by the numbers of a strip."""
    norm = torch.nn.RMSNorm(HEAD_SIZE, dtype=dtype)
    attention = SimpleNamespace(
        q_proj=lambda hidden: hidden,
        q_norm=SimpleNamespace(weight=norm.weight, variance_epsilon=1e-6),
        head_dim=HEAD_SIZE,
    )
    queries = torch.randn(1, 2000, HEADS * HEAD_SIZE).to(dtype)
    angles = torch.rand(1, 2000, HEAD_SIZE // 2).repeat(1, 1, 2)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(strip: int) -> None:
        with patch.object(layers, "_STRIP", strip):
            layers._heads(attention, "q", queries, rotary)

    least = fastest({str(strip): partial(rotate, strip) for strip in STRIPS}, rounds)
    times = "  ".join(f"{1e3 * seconds:8.1f}" for seconds in least.values())
    print(f"{dtype!s:14s} {times}", flush=True)


def measure_new_lengths(dtype: torch.dtype, step: int) -> None:
    """Print what attention costs for lengths that were never seen, and again.

    Args:
        dtype: Of queries, keys and values.
        step: What sizes are rounded up to.
    """
    rng = np.random.default_rng(step)
    befores, lengths = (rng.integers(*span, NEW_LENGTHS) for span in ((60, 120), (20, 400)))
    query, key = (torch.randn(1, heads, 520, HEAD_SIZE).to(dtype) for heads in (HEADS, KEY_HEADS))

    def attend(before: int, length: int) -> None:
        keys = key[:, :, : before + length]
        attention_cpu.tail_by_kernel(query[:, :, :length], keys, keys, HEAD_SIZE**-0.5)

    with patch.object(attention_cpu, "size_step", lambda device, dtype: step):
        calls = [partial(attend, *sizes) for sizes in zip(befores, lengths, strict=True)]
        measure_twice(f"attention     {step:4d}", calls)


def measure_new_rows(dtype: torch.dtype, step: int) -> None:
    """Print what a layer's largest matrix costs for numbers of rows never seen, and again.

    Args:
        dtype: Of weights and rows.
        step: What numbers of rows are rounded up to.
    """
    plain = torch.nn.Linear(HIDDEN, INTERMEDIATE, bias=False, dtype=dtype)
    packed = prepacked(plain)
    rows = torch.randn(2048, HIDDEN).to(dtype)
    sizes = -(-np.random.default_rng(0).integers(1, 2049, NEW_ROWS) // step) * step
    measure_twice(f"a matrix      {step:4d}", [partial(packed, rows[:size]) for size in sizes])


def measure_twice(name: str, calls: Sequence[Callable[[], object]]) -> None:
    """Print the mean cost of the calls at first and again, and what memory both have taken."""
    seconds, memory = [], resident_bytes("VmRSS")
    for _ in range(2):
        start = time.process_time()
        for call in calls:
            call()
        seconds.append((time.process_time() - start) / len(calls))
    more = (resident_bytes("VmRSS") - memory) / 1e6
    times = "  ".join(f"{1e3 * each:6.2f}" for each in seconds)
    print(f"{name}  {times}  {more:13.0f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print all tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=50)
    args = parser.parse_args(argv)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            measure_attention(args.rounds, dtype)
        print("\nnorm and rotation of queries, 2000 tokens, CPU ms by numbers of a strip")
        print(" " * 15 + "  ".join(f"{f'2**{strip.bit_length() - 1}':>8}" for strip in STRIPS))
        for dtype in (torch.float32, torch.bfloat16):
            measure_strips(args.rounds, dtype)
        print(
            f"\nbfloat16, CPU ms each: attention of {NEW_LENGTHS} documents of 20 to 400 tokens "
            f"after 60 to 120;\na matrix of {HIDDEN} by {INTERMEDIATE} with {NEW_ROWS} numbers of "
            "rows up to 2048"
        )
        print("of            step   first   again  MB more after")
        for measure in (measure_new_lengths, measure_new_rows):
            for step in (32, 1):
                measure(torch.bfloat16, step)
        measure_budgets(args.rounds, args.documents)
    return 0


if __name__ == "__main__":
    sys.exit(main())

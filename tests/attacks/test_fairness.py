"""Eight callers with a thousand long documents each, beside small calls; the network is real.

A small call may wait for the pack under way and for its own, which the others fill.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen3_reranker import Qwen3RerankerError, Reranker
from tests.attacks.limits import bounded
from tests.fakes import FRUIT, QUERY
from tests.real_parts import qwen3_tokenizer
from tests.servers import serving

pytestmark = pytest.mark.attack

CALLERS, CALLS, RUNS = 8, 100, 3
APART_S = 0.05
"""Small calls come so far apart, whether those before are answered or not."""
LONG = [f"number {i} " + "of a long document " * 400 for i in range(1000)]
LONG_TOKENS = 1600
TELLING = (
    "import sys; from qwen3_reranker.server import metrics; tell = metrics.Metrics.record_forward; "
    "metrics.Metrics.record_forward = lambda self, record: (tell(self, record), "
    "print('pack', record.run_s, record.tokens, flush=True)); "
    "from qwen3_reranker.cli.main import main; sys.exit(main())"
)

Rank = Callable[[str, list[str]], Awaitable[Any]]
Packs = list[tuple[float, int]]
"""Seconds and tokens of each."""
Run = dict[str, tuple[list[float], Packs]]
"""By what the large calls are at: how long small calls wait, and the packs meanwhile."""


async def run_beside_a_crowd(large: Rank, small: Rank, read_packs: Callable[[], Packs]) -> Run:
    """Have small calls answered while large ones are encoded, and while they are scored."""

    async def ask_much(i: int) -> None:
        with suppress(Qwen3RerankerError, httpx.TransportError):
            while True:
                await large(f"large {i}", LONG)

    async def ask_little(i: int) -> float:
        await asyncio.sleep(APART_S * i)
        started = time.monotonic()
        await small(f"{QUERY} {i}", FRUIT[:2])
        return time.monotonic() - started

    async def ask_all() -> tuple[list[float], Packs]:
        before = len(read_packs())
        waits = await asyncio.gather(*map(ask_little, range(CALLS)))
        return waits, read_packs()[before:]

    crowd = [asyncio.create_task(ask_much(i)) for i in range(CALLERS)]
    await asyncio.sleep(1)  # until all bodies have come
    found = {"encoded": await ask_all()}
    async with asyncio.timeout(120):
        while not any(tokens > LONG_TOKENS for _, tokens in read_packs()[-10:]):
            await asyncio.sleep(0.1)
    found["scored"] = await ask_all()
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    return found


def own_encoding() -> float:
    """Return the seconds in which a small call is encoded alone."""
    took = []
    for i in range(50):
        started = time.perf_counter()
        qwen3_tokenizer().encode_group(None, f"{QUERY} {i}", FRUIT[:2], max_length=8192)
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def check(runs: list[Run]) -> None:
    """Compare the waits of each run with its packs; the median run must be within the bound."""
    encoding = own_encoding()
    for stage in runs[0]:
        margins = []
        for run in runs:
            waits, packs = run[stage]
            seconds = [run_s for run_s, _ in packs]
            p95, pack = statistics.quantiles(waits, n=20)[-1], statistics.median(seconds)
            bound = 2 * pack + encoding + 0.1
            margins.append(bound - p95)
            print(
                f"large calls {stage}: p95 {1000 * p95:.0f} ms, bound {1000 * bound:.0f}, median "
                f"{1000 * statistics.median(waits):.0f}; {len(packs)} packs of median "
                f"{1000 * pack:.0f} ms, at most {1000 * max(seconds):.0f}; own encoding "
                f"{1000 * encoding:.1f} ms"
            )
        assert statistics.median(margins) >= 0


def test_small_calls_in_this_process(
    checkpoint: Callable[..., Path], tried: Callable[[int], None]
) -> None:
    packs: Packs = []
    with Reranker(str(checkpoint()), dtype="float32", device="cpu") as reranker:
        reranker.observe(lambda record: packs.append((record.run_s, record.tokens)))

        def run() -> Run:
            reranker.score(QUERY, FRUIT)
            packs.clear()
            rank = reranker.arank
            return asyncio.run(run_beside_a_crowd(rank, rank, lambda: packs.copy()))

        with bounded(seconds=240, megabytes=3000):
            check([run() for _ in range(RUNS)])
    tried(2 * RUNS * CALLS)


def test_small_calls_over_http(
    checkpoint: Callable[..., Path], tried: Callable[[int], None]
) -> None:
    documents = json.dumps(LONG)

    async def beside_a_crowd(url: str, read_packs: Callable[[], Packs]) -> Run:
        headers = {"Content-Type": "application/json"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600) as client:

            async def large(query: str, _: list[str]) -> None:
                body = f'{{"query": "{query}", "documents": {documents}}}'
                (await client.post("/v1/rerank", content=body)).raise_for_status()

            async def small(query: str, few: list[str]) -> None:
                body = {"query": query, "documents": few}
                (await client.post("/v1/rerank", json=body)).raise_for_status()

            return await run_beside_a_crowd(large, small, read_packs)

    options = ("--dtype", "float32", "--device", "cpu")
    command = (sys.executable, "-c", TELLING)
    with serving(checkpoint(), *options, command=command) as server:

        def run() -> Run:
            before = len(server.log())

            def read_packs() -> Packs:
                found = re.findall(r"^pack (\S+) (\d+)$", server.log()[before:], re.MULTILINE)
                return [(float(run_s), int(tokens)) for run_s, tokens in found]

            return asyncio.run(beside_a_crowd(server.url, read_packs))

        with bounded(seconds=240, megabytes=3000, pid=server.process.pid):
            check([run() for _ in range(RUNS)])
    tried(2 * RUNS * CALLS)

"""Threads and tasks through LangChain, LlamaIndex and the core at once, for as long as asked.

    python -m tests.soak --minutes 30

Every result is compared with the one the same call gave alone, before. Prints how many calls ran,
how far scores were off, how much the resident memory grew after a warm-up, and whether the number
of threads stayed; returns 1 if any of it is not as promised.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from benchmarks.workload import resident_bytes
from langchain_qwen3_reranker import Qwen3Reranker as Compressor
from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker as Postprocessor
from qwen3_reranker import Reranker
from tests import real_parts, texts

THREADS, TASKS = 16, 64
TOLERANCE = 1e-5
MOST_GROWTH_MB = 20
_WARM_UP = 0.25
_QUERIES = [f"water {i}" for i in range(8)]
_POOL = [document for _, document in texts.ordinary_pairs(60)]


@dataclass(frozen=True, slots=True)
class Call:
    """A query and documents, and what the call returned when it was alone."""

    query: str
    documents: list[str]
    expected: dict[str, float]


class Load:
    """Counts what happens; shared by all callers."""

    def __init__(self, folder: str) -> None:
        settings: dict[str, Any] = {"model": folder, "dtype": "float32", "device": "cpu"}
        self.reranker = Reranker.shared(**settings)
        self.compressor = Compressor(**settings, top_n=None)
        self.postprocessor = Postprocessor(**settings, top_n=None, metadata_mode="none")
        chance = random.Random(0)
        self.calls = [self._alone(chance) for _ in range(100)]
        self.lock = threading.Lock()
        self.count, self.wrong, self.largest = 0, 0, 0.0
        self.errors: list[BaseException] = []
        self.stop_at = 0.0

    def _alone(self, chance: random.Random) -> Call:
        query, documents = chance.choice(_QUERIES), chance.sample(_POOL, chance.randint(1, 12))
        scores = self.reranker.score(query, documents)
        return Call(query, documents, dict(zip(documents, scores, strict=True)))

    def check(self, call: Call, found: list[tuple[str, float]]) -> None:
        """Compare a result with the one of the call alone."""
        is_whole = sorted(text for text, _ in found) == sorted(call.documents)
        largest = max(abs(score - call.expected[text]) for text, score in found)
        with self.lock:
            self.count += 1
            self.largest = max(self.largest, largest)
            self.wrong += not is_whole or largest > TOLERANCE

    def through_core(self, call: Call) -> None:
        """Rank by `Reranker.rank`."""
        ranking = self.reranker.rank(call.query, call.documents)
        self.check(call, [(result.document, result.score) for result in ranking])

    def through_langchain(self, call: Call) -> None:
        """Rank by the compressor."""
        documents = [Document(text) for text in call.documents]
        found = self.compressor.compress_documents(documents, call.query)
        self.check(call, [(d.page_content, d.metadata["relevance_score"]) for d in found])

    def through_llama_index(self, call: Call) -> None:
        """Rank by the postprocessor."""
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in call.documents]
        found = self.postprocessor.postprocess_nodes(nodes, query_str=call.query)
        self.check(call, [(node.get_content(), node.get_score()) for node in found])

    async def through_async_core(self, call: Call) -> None:
        """Rank by `Reranker.arank`."""
        ranking = await self.reranker.arank(call.query, call.documents)
        self.check(call, [(result.document, result.score) for result in ranking])

    async def through_async_langchain(self, call: Call) -> None:
        """Rank by the compressor's coroutine."""
        documents = [Document(text) for text in call.documents]
        found = await self.compressor.acompress_documents(documents, call.query)
        self.check(call, [(d.page_content, d.metadata["relevance_score"]) for d in found])

    def run_thread(self, seed: int) -> None:
        """Call until the time is over."""
        chance = random.Random(seed)
        ways: list[Callable[[Call], None]] = [
            self.through_core, self.through_langchain, self.through_llama_index,
        ]  # fmt: skip
        while time.monotonic() < self.stop_at:
            try:
                chance.choice(ways)(chance.choice(self.calls))
            except BaseException as error:
                self.errors.append(error)

    async def run_task(self, seed: int) -> None:
        """Call until the time is over, sometimes giving up half-way."""
        chance = random.Random(seed)
        while time.monotonic() < self.stop_at:
            way = chance.choice([self.through_async_core, self.through_async_langchain])
            try:
                async with asyncio.timeout(chance.choice([None, None, None, 0.005])):
                    await way(chance.choice(self.calls))
            except TimeoutError:
                pass
            except BaseException as error:
                self.errors.append(error)

    def run_all(self, seconds: float) -> None:
        """Run every thread and task for so long."""
        self.stop_at = time.monotonic() + seconds
        threads = [threading.Thread(target=self.run_thread, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()

        async def tasks() -> None:
            await asyncio.gather(*(self.run_task(1000 + i) for i in range(TASKS)))

        asyncio.run(tasks())
        for thread in threads:
            thread.join()


def main(argv: list[str] | None = None) -> int:
    """Run, print, and say whether all was as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        load = Load(str(real_parts.save_random_qwen3(Path(folder))))
        load.run_all(60 * args.minutes * _WARM_UP)
        memory, threads = resident_bytes("VmRSS") / 2**20, threading.active_count()
        load.run_all(60 * args.minutes * (1 - _WARM_UP))
        growth = resident_bytes("VmRSS") / 2**20 - memory
        print(
            f"{args.minutes:g} min, {THREADS} threads and {TASKS} tasks: {load.count} calls, "
            f"{len(load.errors)} errors, {load.wrong} wrong, largest difference "
            f"{load.largest:.1e}; memory {growth:+.1f} MB after the warm-up, threads {threads} "
            f"then {threading.active_count()}"
        )
        for error in load.errors[:3]:
            print(repr(error), file=sys.stderr)
        is_good = (
            load.count > 0
            and not load.errors
            and not load.wrong
            and growth < MOST_GROWTH_MB
            and threading.active_count() <= threads
        )
        load.reranker.close()
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())

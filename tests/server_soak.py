"""Mixed clients at one server, some of which misbehave, for as long as asked.

    python -m tests.server_soak --seconds 60

Every ranking is compared with the one the core gave alone, before. Others send bodies past the
limit, broken bodies and wrong keys, or close their connections while they wait. Prints what was
answered, wrong results, and how much the server's memory grew after a warm-up; returns 1 if any of
it is not as promised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.workload import resident_bytes
from qwen3_reranker import RemoteReranker, Reranker
from tests import real_parts, texts
from tests.servers import serving

KEY = "soak-key"
TOLERANCE = 1e-5
MOST_GROWTH_MB = 20
THREADS = 12
_WARM_UP = 0.4
_POOL = [document for _, document in texts.ordinary_pairs(60)]
_OVERSIZED = b'{"query": "q", "documents": ["' + b"x" * (8 * 1024 * 1024) + b'"]}'


@dataclass(frozen=True, slots=True)
class Call:
    """A request and the score of each document, computed before."""

    query: str
    documents: list[str]
    expected: list[float]


class Load:
    """Clients of one server; counts what happens."""

    def __init__(self, url: str, core: Reranker) -> None:
        chance = random.Random(0)
        self.calls = [self._alone(core, chance) for _ in range(60)]
        self.remote = RemoteReranker(url, api_key=KEY)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60)
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.stop_at = 0.0

    def _alone(self, core: Reranker, chance: random.Random) -> Call:
        query, documents = (
            f"water {chance.randrange(8)}",
            chance.sample(_POOL, chance.randint(1, 12)),
        )
        return Call(query, documents, core.score(query, documents))

    def count(self, name: str) -> None:
        """Count an event."""
        with self.lock:
            self.counts[name] += 1

    def check(self, name: str, call: Call, found: list[tuple[int, float]]) -> None:
        """Compare a ranking with what the core gave."""
        is_right = sorted(i for i, _ in found) == list(range(len(call.documents))) and all(
            abs(score - call.expected[i]) <= TOLERANCE for i, score in found
        )
        self.count(name if is_right else "wrong")

    def through_remote(self, call: Call) -> None:
        """Rank by our client."""
        ranking = self.remote.rank(call.query, call.documents)
        self.check("remote", call, [(r.index, r.score) for r in ranking])

    def through_async_remote(self, call: Call) -> None:
        """Rank by our client's coroutine, on an event loop of its own."""
        ranking = asyncio.run(self.remote.arank(call.query, call.documents))
        self.check("async remote", call, [(r.index, r.score) for r in ranking])

    def through_cohere(self, call: Call) -> None:
        """Rank as Cohere's client does."""
        body = {"query": call.query, "documents": call.documents, "model": "m", "top_n": None}
        rows = self.http.post("/v2/rerank", json=body).raise_for_status().json()["results"]
        self.check("cohere", call, [(r["index"], r["relevance_score"]) for r in rows])

    def through_tei(self, call: Call) -> None:
        """Rank as TEI's clients do."""
        body = {"query": call.query, "texts": call.documents}
        rows = self.http.post("/rerank", json=body).raise_for_status().json()
        self.check("tei", call, [(r["index"], r["score"]) for r in rows])

    def kill(self, call: Call) -> None:
        """Leave while the server works."""
        body = {"query": call.query, "documents": [f"{i} {' '.join(_POOL)}" for i in range(8)]}
        try:
            self.http.post("/v1/rerank", json=body, timeout=httpx.Timeout(60, read=0.02))
        except httpx.ReadTimeout:
            self.count("killed")

    def oversize(self, call: Call) -> None:
        """Send more than the server takes."""
        try:
            status = self.http.post("/v1/rerank", content=_OVERSIZED).status_code
        except httpx.TransportError:  # it closed the connection while we were sending
            status = 413
        self.count("oversized" if status == 413 else "wrong")

    def spoil(self, call: Call) -> None:
        """Send what is no request, and a wrong key."""
        for content, headers, expected in (
            (b"{", {}, 422),
            (json.dumps({"query": call.query}).encode(), {}, 400),
            (b"{}", {"Authorization": "Bearer wrong"}, 401),
        ):
            status = self.http.post("/v1/rerank", content=content, headers=headers).status_code
            self.count("refused" if status == expected else "wrong")

    def run_thread(self, seed: int) -> None:
        """Do one after the other until the time is over."""
        chance = random.Random(seed)
        good: list[Callable[[Call], None]] = [
            self.through_remote, self.through_async_remote, self.through_cohere, self.through_tei,
        ]  # fmt: skip
        bad: list[Callable[[Call], None]] = [self.kill, self.oversize, self.spoil]
        while time.monotonic() < self.stop_at:
            way = chance.choice(bad if chance.random() < 0.1 else good)
            try:
                way(chance.choice(self.calls))
            except Exception as error:
                self.errors.append(f"{way.__name__}: {error!r}")

    def run(self, seconds: float) -> None:
        """Run all threads for so long."""
        self.stop_at = time.monotonic() + seconds
        threads = [threading.Thread(target=self.run_thread, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main(argv: list[str] | None = None) -> int:
    """Run, print, and say whether all was as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.server_soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args(argv)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        real_parts.save_random_qwen3(Path(folder))
        with (
            Reranker(folder, **settings) as core,
            serving(folder, "--dtype", "float32", "--device", "cpu", api_key=KEY) as server,
        ):
            load = Load(server.url, core)
            load.run(args.seconds * _WARM_UP)
            memory = resident_bytes("VmRSS", server.process.pid)
            load.run(args.seconds * (1 - _WARM_UP))
            growth = (resident_bytes("VmRSS", server.process.pid) - memory) / 2**20
            load.remote.close()
            load.http.close()
            has_traceback = "Traceback" in server.log()
    counts = ", ".join(f"{name} {count}" for name, count in sorted(load.counts.items()))
    print(
        f"{args.seconds:g} s, {THREADS} threads: {counts}; {load.counts['wrong']} wrong, "
        f"{len(load.errors)} errors; the server's memory {growth:+.1f} MB after the warm-up"
    )
    for error in load.errors[:3]:
        print(error, file=sys.stderr)
    is_good = not load.counts["wrong"] and not load.errors and growth < MOST_GROWTH_MB
    return 0 if is_good and load.counts["killed"] and not has_traceback else 1


if __name__ == "__main__":
    sys.exit(main())

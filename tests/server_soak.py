"""Mixed clients at one server, some of which misbehave, for as long as asked.

    python -m tests.server_soak --minutes 5

Every ranking is compared with the one the core gave alone, before. Others send the requests of
`tests.attacks.clients`, bodies past the limit, keep the server waiting, or close their connections
while they wait. Prints what was answered, wrong results, the size of the log, and the server's
memory at equal intervals after a warm-up of the same traffic; returns 1 if any of it is not as
promised. Bodies on their way make the memory go up and down by 20 MB, so its growth is from the
median of the first quarter of the time to that of the last.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
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
from tests.attacks import clients
from tests.servers import serving

KEY = "soak-key"
TOLERANCE = 1e-5
MOST_GROWTH_MB = 20
MOST_LOG_MB = 1
THREADS = 12
HELD = 20
"""Connections of each kind that keep the server waiting."""
_WARM_UP_S = 120.0
_INTERVAL_S = 5.0
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
        self.url = url
        self.hostile = clients.hostile_requests(KEY)
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

    def attack(self, call: Call) -> None:
        """Send one of the requests that are made to harm."""
        name = random.choice(list(self.hostile))
        is_right = clients.send(self.url, name, *self.hostile[name])
        self.count("attacks" if is_right else "wrong")
        if not is_right:
            self.errors.append(f"{name} was not answered as it is to be")

    def hold(self) -> None:
        """Keep connections waiting until the time is over."""
        while not self.is_over():
            try:
                ended = clients.hold(self.url, KEY, count=HELD, is_over=self.is_over)
            except OSError as error:
                self.errors.append(f"hold: {error!r}")
                continue
            for kind, is_right in ended.items():
                self.count("held" if is_right else "wrong")
                if not is_right:
                    self.errors.append(f"{kind} was not ended")

    def is_over(self) -> bool:
        """Say whether the time is over."""
        return time.monotonic() >= self.stop_at

    def run_thread(self, seed: int) -> None:
        """Do one after the other until the time is over."""
        chance = random.Random(seed)
        good: list[Callable[[Call], None]] = [
            self.through_remote, self.through_async_remote, self.through_cohere, self.through_tei,
        ]  # fmt: skip
        bad: list[Callable[[Call], None]] = [self.kill, self.oversize, self.attack, self.attack]
        while not self.is_over():
            way = chance.choice(bad if chance.random() < 0.3 else good)
            try:
                way(chance.choice(self.calls))
            except Exception as error:
                self.errors.append(f"{way.__name__}: {error!r}")

    def run(self, seconds: float) -> None:
        """Run all threads for so long."""
        self.stop_at = time.monotonic() + seconds
        threads = [threading.Thread(target=self.run_thread, args=(i,)) for i in range(THREADS)]
        threads.append(threading.Thread(target=self.hold))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main(argv: list[str] | None = None) -> int:
    """Run, print, and say whether all was as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.server_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="after the warm-up")
    args = parser.parse_args(argv)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        real_parts.save_random_qwen3(Path(folder))
        with (
            Reranker(folder, **settings) as core,
            serving(folder, "--dtype", "float32", "--device", "cpu", api_key=KEY) as server,
        ):
            load = Load(server.url, core)
            load.run(_WARM_UP_S)
            sizes: list[float] = []
            running = threading.Thread(target=load.run, args=(60 * args.minutes,))
            running.start()
            while running.is_alive():
                sizes.append(resident_bytes("VmRSS", server.process.pid) / 2**20)
                running.join(_INTERVAL_S)
            load.remote.close()
            load.http.close()
            log = server.log()
    quarter, log_mb = -(-len(sizes) // 4), len(log) / 1e6
    growth = statistics.median(sizes[-quarter:]) - statistics.median(sizes[:quarter])
    counts = ", ".join(f"{name} {count}" for name, count in sorted(load.counts.items()))
    print(
        f"{args.minutes:g} min after {_WARM_UP_S:g} s, {THREADS} threads: {counts}; "
        f"{load.counts['wrong']} wrong, {len(load.errors)} errors, log {log_mb:.2f} MB; the "
        f"server's memory {growth:+.1f} MB after the warm-up, every {_INTERVAL_S:g} s "
        f"{' '.join(f'{size:.0f}' for size in sizes)}"
    )
    for error in load.errors[:3]:
        print(error, file=sys.stderr)
    is_good = not load.counts["wrong"] and not load.errors and "Traceback" not in log
    is_small = growth < MOST_GROWTH_MB and log_mb < MOST_LOG_MB
    return 0 if is_good and is_small and load.counts["killed"] else 1


if __name__ == "__main__":
    sys.exit(main())

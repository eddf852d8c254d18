"""Cost of scoring now and at another commit: whether a change has made it slower.

    python -m benchmarks.commits HEAD~1 --workloads w1-12 w6 --rounds 7

Each tree loads the same checkpoint into a process of its own, and the two take turns, so that what
else the machine does falls on both. Scores must agree. Knows nothing of other libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .speed import WIDTHS, WORKLOADS, draw_batch, save_checkpoint
from .workload import add_run_options, describe_machine

ROOT = Path(__file__).parents[1]
_TOLERANCE = 1e-4
_WORKER = """
import json, sys
import torch
from benchmarks.contenders import OURS, load
from benchmarks.workload import read_clock
folder, dtype, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
(ours,) = load(folder, dtype, "cpu", [OURS])
for line in sys.stdin:
    batch = [tuple(row) for row in json.loads(line)]
    start = read_clock("cpu")
    scores = ours.score(batch)
    print(json.dumps([read_clock("cpu") - start, scores]), flush=True)
"""


class Tree:
    """A checkout that scores in a process of its own."""

    def __init__(self, root: Path, checkpoint: Path, dtype: str, threads: int) -> None:
        command = [sys.executable, "-c", _WORKER, str(checkpoint), dtype, str(threads)]
        self._process = subprocess.Popen(  # noqa: S603
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={"PYTHONPATH": f"{root}:{root / 'integrations'}", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip

    def score(self, batch: Any) -> tuple[float, list[float]]:
        """Return CPU seconds and scores.

        Raises:
            RuntimeError: If the process has ended.
        """
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps(batch) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a checkout's process has ended; its own message is above.")
        seconds, scores = json.loads(answer)
        return seconds, scores

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Yield a folder with the files of a commit and the tests' cached tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)  # noqa: S603
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)  # noqa: S603


def compare(args: argparse.Namespace, other: Path, dtype: str) -> list[str]:
    """Return a row of Markdown per workload: least CPU seconds of each tree, and their ratio."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        save_checkpoint(Path(name), args, dtype, args.layers)
        trees = [Tree(root, Path(name), dtype, args.threads) for root in (ROOT, other)]
        for workload in args.workloads:
            batch = draw_batch(WORKLOADS[workload], args.seed)
            (_, ours), (_, theirs) = [tree.score(batch) for tree in trees]  # warms up, too
            difference = float(np.abs(np.subtract(ours, theirs)).max())
            if not difference <= _TOLERANCE:
                raise SystemExit(f"{workload}, {dtype}: the commits differ by {difference:.2g}")
            seconds: list[list[float]] = [[], []]
            for number in range(args.rounds * args.repeats):
                for i in (0, 1) if number % 2 else (1, 0):
                    seconds[i].append(trees[i].score(batch)[0])
            now, then = map(min, seconds)
            rows.append(
                f"| {workload} | {dtype} | {now:.4f} | {then:.4f} | {now / then:.3f} "
                f"| {difference:.1g} |"
            )
        for tree in trees:
            tree.close()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commits", description=__doc__)
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["w1-12", "w6"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--widths", choices=WIDTHS, default="0.6b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1, help="calls of each in a round")
    add_run_options(parser)
    args = parser.parse_args(argv)
    print(describe_machine(("torch", "transformers")))
    print("| workload | dtype | now, CPU s | then, CPU s | ratio | scores differ by |")
    print("|---|---|---|---|---|---|")
    with checkout(args.commit) as other:
        for dtype in args.dtypes:
            print("\n".join(compare(args, other, dtype)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

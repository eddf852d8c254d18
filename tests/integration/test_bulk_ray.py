"""The recipe for Ray scores what one process scores, and goes on where it was killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3_reranker.bulk import BulkScorer
from tests.texts import ordinary_pairs

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/07_bulk_ray.py"
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
    "RAY_worker_register_timeout_seconds": "300",  # on a busy machine; Ray would start ever more
}  # fmt: skip
FILES, ROWS = 20, 50

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed: `make ray` does it"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 1,000 pairs, ten to a query, some with an instruction, in 20 files."""
    folder = tmp_path_factory.mktemp("pairs")
    texts = ordinary_pairs(FILES * ROWS)
    for number in range(FILES):
        rows = range(number * ROWS, (number + 1) * ROWS)
        columns = {
            "id": pa.array(rows, pa.int32()),
            "query": [texts[row // 10 * 10][0] or "query" for row in rows],
            "document": [texts[row][1] for row in rows],
            "instruction": pa.array([None if row % 20 < 10 else "Find" for row in rows]),
        }
        pq.write_table(pa.table(columns), folder / f"{number:02}.parquet")
    return folder


@contextmanager
def running(
    pairs: Path, output: Path, model: Path, *options: str
) -> Iterator[subprocess.Popen[str]]:
    """Run the recipe on two actors, counting in `scored` beside the output folder."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tests.bulk_run", str(output.parent / "scored"), str(RECIPE),
            str(pairs), str(output), "--model", str(model), "--actors", "2", *options,
        ],
        cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(pairs: Path, output: Path, model: Path, *options: str) -> str:
    with running(pairs, output, model, *options) as process:
        printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed
    return printed


def counts(output: Path) -> Counter[int]:
    """Return how often each pair was scored."""
    lines = (output.parent / "scored").read_text().splitlines()
    return Counter(id for line in lines for id in json.loads(line))


def whole_files(output: Path) -> set[str]:
    return {file.name for file in output.glob("*.parquet")}


def test_two_actors_score_what_one_process_does(
    checkpoint: Callable[..., Path], pairs: Path, tmp_path: Path
) -> None:
    model, output = checkpoint(), tmp_path / "output"
    printed = run(pairs, output, model, "--dry_run")
    assert "pairs a second" in printed
    assert "hours for a million" in printed
    assert not whole_files(output)
    (tmp_path / "scored").unlink()

    assert f"[{FILES}/{FILES}]" in run(pairs, output, model)
    assert counts(output) == dict.fromkeys(range(FILES * ROWS), 1)
    scorer = BulkScorer(str(model))
    for file in sorted(pairs.iterdir()):
        source, found = pq.read_table(file), pq.read_table(output / file.name)
        assert found.select(source.column_names).equals(source)
        expected = scorer(source.to_pydict())
        np.testing.assert_allclose(found["log_odds"], expected["log_odds"], atol=1e-5)
        np.testing.assert_allclose(found["score"], expected["score"], atol=1e-5)
        assert found["truncated"].to_pylist() == expected["truncated"].tolist()
    assert {path.suffix for path in output.iterdir()} == {".parquet"}
    assert f"{FILES} of them scored already" in run(pairs, output, model)


def test_block_of_the_guide_scores_what_one_process_does(
    checkpoint: Callable[..., Path], pairs: Path, tmp_path: Path
) -> None:
    (block,) = re.findall(
        r"^```python\n(import ray\n.*?)^```",
        (ROOT / "docs/bulk.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    (tmp_path / "pairs").mkdir()
    for name in ("00.parquet", "01.parquet"):
        shutil.copy(pairs / name, tmp_path / "pairs" / name)
    subprocess.run(
        [sys.executable, "-c", block.replace("Qwen/Qwen3-Reranker-0.6B", str(checkpoint()))],
        cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=500,
    )  # fmt: skip
    source = pq.read_table(tmp_path / "pairs").sort_by("id")
    found = pq.read_table(tmp_path / "scored").sort_by("id")
    assert found.select(source.column_names).to_pylist() == source.to_pylist()
    expected = BulkScorer(str(checkpoint()))(source.to_pydict())
    np.testing.assert_allclose(found["log_odds"], expected["log_odds"], atol=1e-5)


def test_killed_run_goes_on_and_no_pair_is_lost_or_there_twice(
    checkpoint: Callable[..., Path], pairs: Path, tmp_path: Path
) -> None:
    model, output = checkpoint(), tmp_path / "output"
    end = time.monotonic() + 500
    with running(pairs, output, model) as process:
        while len(whole_files(output)) < 4 and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = whole_files(output)
    while True:  # an actor outlives its driver by as much as it takes to notice
        time.sleep(3)
        if whole_files(output) == before:
            break
        before = whole_files(output)
    assert 4 <= len(before) < FILES
    kept = {name: (output / name).stat().st_mtime_ns for name in before}

    printed = run(pairs, output, model)
    assert f"{len(before)} of them scored already" in printed
    tables = {file.name: pq.read_table(file) for file in sorted(output.iterdir())}
    ids = [id for table in tables.values() for id in table["id"].to_pylist()]
    assert ids == list(range(FILES * ROWS))
    assert {name: (output / name).stat().st_mtime_ns for name in before} == kept
    # What was whole was scored once; what was not is scored again: a file of each actor at most.
    found = counts(output)
    once = {id for name in before for id in tables[name]["id"].to_pylist()}
    assert {found[id] for id in once} == {1}
    assert found.keys() == set(ids)
    assert sum(found.values()) - len(ids) <= 2 * ROWS

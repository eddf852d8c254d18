"""The training benchmark on tiny widths: it runs, and refuses to time different work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import server_load, training
from benchmarks.trainers import load_ours, load_plain
from tests.official import SUFFIX


@pytest.mark.slow  # a process per contender
def test_training_benchmark_prints_and_stores_every_contender(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "training.json"
    command = "--widths tiny --layers 1 --groups 1 --rounds 2 --reference-rounds 0 --json"
    assert training.main([*command.split(), str(file)]) == 0
    ours, *others = json.loads(file.read_text())["results"]
    table = capsys.readouterr().out
    assert others
    for result in (ours, *others):
        assert result["contender"] in table
        assert len(result["seconds"]) == 2
        assert result["peak_mb"] > result["loaded_mb"] > 0
    assert all(result["tokens"] > ours["tokens"] for result in others)


def test_training_benchmark_times_no_different_work(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(num_hidden_layers=1)
    rows = training.draw_rows(folder, 1, 0)
    setting = training.Setting(folder, SUFFIX, rows, "float32", "cpu", 0)
    swapped = dataclasses.replace(rows[0], query="another query")
    other = dataclasses.replace(setting, rows=[swapped])
    contenders = [load_ours(setting), load_plain(other, 8, False)]
    with pytest.raises(training.DisagreementError, match="Trainer, 8 pairs"):
        training.check_agreement(contenders, training.TOLERANCES["float32"])


@pytest.mark.slow  # starts a server
def test_server_load_prints_and_stores_every_concurrency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_load, "COMPAT_PYTHON", tmp_path / "none")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "load.json"
    command = "--widths tiny --layers 1 --requests 4 --rounds 1 --concurrency 1 2 --json"
    assert server_load.main([*command.split(), str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["server"], r["concurrency"]) for r in results] == [("ours", 1), ("ours", 2)]
    table = capsys.readouterr().out
    for result in results:
        assert f"| ours | {result['per_second']:.1f} |" in table
        assert 0 < result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"]

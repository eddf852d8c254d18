"""Benchmarks on tiny widths: they run, refuse to time different work, and show no growth."""

from __future__ import annotations

import dataclasses
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import eval_sets, growth, mining, server_load, training
from benchmarks.trainers import load_ours, load_plain
from benchmarks.workload import in_new_process
from tests import texts
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


def peak_mb(folder: Path, series: str, size: int) -> float:
    peak: float = in_new_process(growth.measure, str(folder), series, size, 1, 1).peak_mb
    return peak


@pytest.mark.slow  # processes that score for minutes
def test_memory_does_not_grow_with_documents(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    few, many = (peak_mb(folder, "documents", n) for n in (1000, 10_000))
    print(f"{few:.0f} MB for 1,000 documents, {many:.0f} MB for 10,000")
    assert many <= 1.1 * few


@pytest.mark.slow
def test_memory_is_linear_in_length_and_bounded_under_a_long_query(
    checkpoint: Callable[..., Path],
) -> None:
    folder = checkpoint()
    short, middle, long = (peak_mb(folder, "length", n) for n in (30, 8000, 32_000))
    print(f"{short:.0f}, {middle:.0f}, {long:.0f} MB for 30, 8,000 and 32,000 tokens")
    assert long - short <= 1.25 * (32_000 / 8000) * (middle - short)
    brief, lengthy = (peak_mb(folder, "query", n) for n in (15, 4000))
    print(f"{brief:.0f}, {lengthy:.0f} MB for a query of 15 and of 4,000 tokens, 500 documents")
    assert lengthy <= 1.5 * brief


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


@pytest.mark.slow  # two trainings
def test_mining_benchmark_plants_mines_and_trains(
    checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    documents = [document for _, document in texts.ordinary_pairs(40)]
    candidates = [{"text": text, "label": int(i < 2)} for i, text in enumerate(documents[:6])]
    rows = {name: [{"query": "the city", "candidates": candidates}] for name in mining.SETS}
    rows["med_en.train"] = [
        {"query": f"the {place}", "positive": documents[2 * i : 2 * i + 2],
         "negative": documents[20:], "instruction": "Find it"}
        for i, place in enumerate(("river", "city", "paper", "light", "data", "model"))
    ]  # fmt: skip
    for name, lines in rows.items():
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    model = str(checkpoint())
    command = ["--teacher", model, "--student", model, "--num_rows", "6", "--margin", "0"]
    output = tmp_path / "figures"
    for _ in range(2):  # the second run finds everything done
        assert mining.main([str(tmp_path), *command, "--output_dir", str(output)]) == 0
        out = capfd.readouterr().out
        assert out.count("lists with several relevant passages") == 3
        assert "\nBM25, filtered: " in out
        assert "| BM25 alone | BM25, filtered |" in out


def test_eval_sets_scores_a_set_once_and_counts_what_lies_deeper_as_missing(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates = [{"text": text, "label": int(text == "b")} for text in "abc"]
    with lzma.open(tmp_path / f"food{eval_sets.ENDING}", "wt") as file:
        for query in ("bread", "tea", "milk"):
            file.write(json.dumps({"query": query, "candidates": candidates}) + "\n")
    command = [str(tmp_path), "--model", str(checkpoint()), "--output_dir", str(tmp_path / "o")]
    assert eval_sets.main([*command, "--depth", "1", "--num_lists", "2"]) == 0
    line = "| food | 2 | 2 | 0.000 | 0.000 | +0.000 [+0.000, +0.000] | 1.0000 | 0, 2, 0 |"
    assert line in capsys.readouterr().out
    for num_reused in (0, 1):
        assert eval_sets.main(command) == 0
        out = capsys.readouterr().out
        assert out.count("reused") == num_reused
        assert "| food | 3 | 9 | 0.631 | " in out
    figures = json.loads((tmp_path / "o/eval_sets.json").read_text())
    assert figures["sets"]["food"]["MRR@10"]["mean_before"] == 0.5

"""Several processes learn what one process learns from all their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ZERO_2 = ROOT / "recipes/cluster/zero2.json"

pytestmark = pytest.mark.slow


@pytest.fixture
def run(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that trains on some processes and returns what each held and told."""
    model = checkpoint()

    def train(name: str, *flags: str, processes: int = 2) -> list[dict[str, Any]]:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [
                sys.executable, *launcher, "--nproc-per-node", str(processes),
                "-m", "tests.training_run", str(model), str(tmp_path / name), *flags,
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=400,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = []
        for rank in range(processes):
            told = json.loads((tmp_path / name / f"rank{rank}.json").read_text())
            weights = load_file(tmp_path / name / f"rank{rank}.safetensors")
            assert told["world"] == processes
            found.append({**told, "weights": weights})
        return found

    return train


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_learn_what_one_learns_from_the_union(
    run: Callable[..., list[dict[str, Any]]], accumulation: int
) -> None:
    (alone,) = run("alone", processes=1)
    first, second = run("ddp", "--accumulation", str(accumulation))
    assert first["wrapper"] == "DistributedDataParallel"
    assert distance(first["weights"], second["weights"]) == 0
    assert distance(first["weights"], alone["weights"]) < 1e-5
    assert first["losses"] == pytest.approx(alone["losses"], abs=2e-4)  # logged with 4 digits


def test_a_call_past_the_wrapper_is_noticed(run: Callable[..., list[dict[str, Any]]]) -> None:
    first, second = run("unwrapped", "--unwrapped")
    assert distance(first["weights"], second["weights"]) > 1e-3


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero_2_learns_what_one_process_learns(
    run: Callable[..., list[dict[str, Any]]], accumulation: int
) -> None:
    (alone,) = run("alone", processes=1)
    first, second = run("zero", "--deepspeed", str(ZERO_2), "--accumulation", str(accumulation))
    assert first["wrapper"] == "DeepSpeedEngine"
    assert distance(first["weights"], second["weights"]) == 0
    assert distance(first["weights"], alone["weights"]) < 1e-5
    assert first["losses"] == pytest.approx(alone["losses"], abs=2e-4)


def test_a_run_of_two_processes_is_the_run_of_one(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """From the command line to the report, which one of them writes."""
    recipe = ROOT / "recipes/support"
    train = (recipe / "train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "train.jsonl").write_text("\n".join(train))
    lists = (recipe / "dev.jsonl").read_text().splitlines()[:3]  # no multiple of two
    (tmp_path / "dev.jsonl").write_text("\n".join(lists))

    def run(name: str, processes: int) -> tuple[dict[str, torch.Tensor], Any, str]:
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", str(processes), "-m", "finetune", "train",
                "--model_name_or_path", str(checkpoint()), "--output_dir", str(tmp_path / name),
                "--train_file", str(tmp_path / "train.jsonl"),
                "--eval_file", str(tmp_path / "dev.jsonl"), "--use_cpu", "true",
                "--per_device_train_batch_size", str(4 // processes), "--num_train_epochs", "1",
                "--adam_epsilon", "1e-3", "--max_length", "256", "--num_negatives", "3",
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=400,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads((tmp_path / name / "report.json").read_text())
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        return weights, report["sets"], done.stdout

    alone, figures, _ = run("alone", 1)
    shared, same_figures, said = run("shared", 2)
    assert distance(shared, alone) < 1e-5
    (before, after), (same_before, same_after) = (
        [each["metrics"]["nDCG@10"][when] for when in ("mean_before", "mean_after")]
        for (each,) in (figures, same_figures)
    )
    assert (same_before, same_after) == pytest.approx((before, after))
    assert said.count("Next, rerank with it:") == 1

"""Runs of `train` that are killed, stopped, damaged or out of disk, and what they come to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import get_last_checkpoint

from finetune.checkpoints import starting_point
from finetune.output import MANIFEST, commit, verify
from tests import real_parts, texts

GO_ON = ["--resume_from_checkpoint", "true"]
CLOCK = {"groups/s", "tokens/s", "memory_gb"}
STEPS = 8


class Runs:
    """Trains in folders of its own, all alike, in forks of one process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        model = real_parts.save_random_qwen3(root / "model", num_hidden_layers=2)
        documents = [document for _, document in texts.ordinary_pairs(40)]
        rows = [
            {"query": f"topic {i}", "positive": [documents[i].upper()],
             "negative": documents[i + 1 : i + 4]}
            for i in range(16)
        ]  # fmt: skip
        lists = [
            {"query": f"subject {i}", "candidates": [{"text": documents[20 + i], "label": 0},
             {"text": documents[19 - i].upper(), "label": 1}]}
            for i in range(4)
        ]  # fmt: skip
        for name, content in (("train", rows), ("dev", lists)):
            (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        # Evaluations that gain nothing end it after 8 of 12 steps. It logs where it does not save,
        # accumulates, and draws dropout. The best state is that of step 2.
        self.argv = [
            "--model_name_or_path", str(model), "--train_file", str(root / "train.jsonl"),
            "--eval_file", str(root / "dev.jsonl"), "--output_dir", "run", "--learning_rate",
            "5e-3", "--max_length", "128", "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", "2", "--num_train_epochs", "3", "--eval_steps", "2",
            "--logging_steps", "3", "--lora_dropout", "0.1", "--disable_tqdm", "true",
        ]  # fmt: skip
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "tests.resume_driver", *self.argv],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._input, self._output = self._driver.stdin, self._driver.stdout
        for line in self._output:
            if line.strip() == "ready":
                return
        raise RuntimeError("the driver did not start")

    def close(self) -> None:
        """End the driver."""
        self._input.close()
        self._driver.wait(30)
        self._output.close()

    def train(self, folder: Path, *flags: str, **fault: Any) -> tuple[int, str]:
        """Return the exit status, negative for a signal, and what was printed."""
        folder.mkdir(exist_ok=True)
        job = {"folder": str(folder), "argv": [*self.argv, *flags], "fault": fault}
        self._input.write(json.dumps(job) + "\n")
        self._input.flush()
        status: int = json.loads(self._output.readline())["status"]
        return status, (folder / "log").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain(runs: Runs) -> Path:
    """Return the folder of a run that nothing happened to."""
    folder = runs.root / "plain"
    assert runs.train(folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def killed(runs: Runs) -> Path:
    """Return the folder of a run that was killed when it had saved steps 2 and 6."""
    folder = runs.root / "killed"
    assert runs.train(folder, kill="step", step=7)[0] == -signal.SIGKILL
    return folder


def outcome(folder: Path, *, history: bool = True) -> dict[str, Any]:
    """Return all of a run that a clock has no part in, bit for bit."""
    found: dict[str, Any] = {}
    for file in sorted((folder / "run").rglob("*")):
        name = str(file.relative_to(folder / "run"))
        if file.suffix in (".safetensors", ".pt", ".pth"):
            found[name] = file.read_bytes()
        elif history and file.name in ("trainer_state.json", "run.json"):
            content = json.loads(file.read_text())
            content.pop("training", None)  # holds --resume_from_checkpoint
            for key in ("log_history", "history"):
                content[key] = [
                    {name: entry[name] for name in entry.keys() - CLOCK}
                    for entry in content.get(key, ())
                    if "train_runtime" not in entry  # of this process, not of the run
                ]
            found[name] = content
    return found


POINTS = [
    ("step", 1), ("step", 5), ("step", 7), ("model", 2), ("model", 4), ("optimizer", 6),
    ("scheduler", 6), ("rng", 6), ("trainer state", 6), ("before manifest", 6),
    ("manifest written", 6), ("manifest renamed", 6), ("rotation", 6), ("model", STEPS),
    ("adapter written", 0), ("adapter half moved", 0), ("adapter moved", 0),
]  # fmt: skip
QUICK = {("trainer state", 6), ("adapter half moved", 0)}


@pytest.mark.parametrize(
    ("point", "step"),
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in POINTS],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    runs: Runs, plain: Path, tmp_path: Path, point: str, step: int
) -> None:
    status, _ = runs.train(tmp_path, kill=point, step=step)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "run" / MANIFEST).exists()
    assert point == "adapter moved" or not (tmp_path / "run/adapter_config.json").exists()
    status, log = runs.train(tmp_path, *GO_ON)
    assert status == 0, log
    is_unfinished = step > 0 and point not in ("step", "manifest renamed", "rotation")
    assert ("Skipped" in log) == is_unfinished, log
    assert outcome(tmp_path) == outcome(plain)
    assert set(os.listdir(tmp_path / "run")) == set(os.listdir(plain / "run"))


def test_the_run_under_test_stops_early_at_its_best_and_logs_where_it_saves(plain: Path) -> None:
    state = json.loads((plain / f"run/checkpoint-{STEPS}/trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["best_global_step"]) == (STEPS, 12, 2)
    found = outcome(plain)
    best, last = (found[f"checkpoint-{step}/adapter_model.safetensors"] for step in (2, STEPS))
    assert found["adapter_model.safetensors"] == best != last
    assert [each["step"] for each in state["log_history"] if "loss" in each] == [2, 3, 4, 6, 8]


def test_a_finished_run_started_again_changes_nothing(runs: Runs, plain: Path) -> None:
    def content() -> dict[str, tuple[bytes, int]]:
        files = [file for file in (plain / "run").rglob("*") if file.is_file()]
        return {str(f): (f.read_bytes(), f.stat().st_mtime_ns * (f.name != ".lock")) for f in files}

    before = content()
    for flags in ([], GO_ON):
        status, log = runs.train(plain, *flags)
        assert (status, "already complete" in log) == (0, True)
        assert content() == before


DAMAGED = [
    "adapter_model.safetensors", "adapter_config.json", "README.md", "optimizer.pt",
    "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST,
]  # fmt: skip


def test_no_damage_to_any_file_is_resumed_from(killed: Path, tmp_path: Path) -> None:
    silent, by_trainer = [], 0
    newest = killed / "run/checkpoint-6"
    assert {file.name for file in newest.iterdir()} == set(DAMAGED)
    settings = verify(newest)
    for name in DAMAGED:
        content = (newest / name).read_bytes()
        other = (killed / "run/checkpoint-2" / name).read_bytes()
        damaged = {
            "deleted": None,
            "halved": content[: len(content) // 2],
            "end zeroed": content[: -len(content) // 4] + bytes(len(content) // 4),
            "one bit": content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
            # Where both are alike, that of a run with other settings.
            "of another": other if other != content else content.replace(b"r", b"rr", 1),
        }
        for kind, wrong in damaged.items():
            run = tmp_path / f"{name} {kind}" / "run"
            shutil.copytree(killed / "run", run)
            file = run / "checkpoint-6" / name
            file.unlink()
            if wrong is not None:
                file.write_bytes(wrong)
            said: list[str] = []
            start = starting_point(
                run, "true", settings, allow_changed=False, needs_best=True, say=said.append
            )
            if start is None or start.checkpoint.name != "checkpoint-2" or "Skipped" not in said[0]:
                silent.append((name, kind))
            by_trainer += get_last_checkpoint(str(run)) == str(run / "checkpoint-6")
    assert not silent
    assert by_trainer == 40, "the Trainer by itself takes them all"


@pytest.mark.slow
def test_a_run_that_falls_back_ends_the_same(
    runs: Runs, plain: Path, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed / "run", tmp_path / "run")
    weights = tmp_path / "run/checkpoint-6/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4000] + bytes(4000))
    status, log = runs.train(tmp_path, *GO_ON)
    assert (status, "Skipped checkpoint-6" in log) == (0, True)
    assert outcome(tmp_path) == outcome(plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_unverified_a_run_would_end_otherwise(
    runs: Runs, plain: Path, killed: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(killed / "run", tmp_path / "run")
    newest = tmp_path / "run/checkpoint-6"
    settings = verify(newest)
    (newest / name).unlink()
    commit(newest, [file for file in DAMAGED if file not in (name, MANIFEST)], settings)
    assert runs.train(tmp_path, *GO_ON)[0] == 0, "the Trainer does not mind"
    assert weights(tmp_path) != weights(plain)


def test_a_full_disk_keeps_the_last_checkpoint(runs: Runs, plain: Path, tmp_path: Path) -> None:
    fail_at_write(runs, tmp_path, 16)  # in the second checkpoint
    status, log = runs.train(tmp_path, *GO_ON)
    assert status == 0, log
    assert outcome(tmp_path) == outcome(plain)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(runs: Runs, tmp_path: Path) -> None:
    count = 1
    while fail_at_write(runs, tmp_path / str(count), count, "--max_steps", "4"):
        count += 1
    assert count > 25  # of two checkpoints and the adapter


def fail_at_write(runs: Runs, folder: Path, count: int, *flags: str) -> bool:
    """Return whether the run had so many writes; it must have ended well either way."""
    status, log = runs.train(folder, *flags, write=count)
    if status == 0:
        return False
    assert status == 74, log
    assert "bytes" in log or count == 1  # the first is the lock
    assert "--resume_from_checkpoint true" in log
    left = sorted((folder / "run").glob("checkpoint-*"))
    for each in left:
        verify(each)
    assert not (folder / "run" / MANIFEST).exists()
    assert not (folder / "run/.unfinished").exists()
    return True


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_at_the_next_step(
    runs: Runs, plain: Path, tmp_path: Path, number: int, status: int
) -> None:
    found, log = runs.train(tmp_path, signal=number, step=4)
    assert found == status, log
    assert "saved at step 5" in log
    assert "--resume_from_checkpoint true" in log
    verify(tmp_path / "run/checkpoint-5")
    assert runs.train(tmp_path, *GO_ON)[0] == 0
    assert weights(tmp_path) == weights(plain)


def weights(folder: Path) -> list[Any]:
    """Return the adapter, and all of the last checkpoint but the log, which has a line more."""
    found = outcome(folder, history=False)
    names = [name for name in found if name.startswith(f"checkpoint-{STEPS}")]
    assert len(names) == 4
    return [found["adapter_model.safetensors"], *(found[name] for name in sorted(names))]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_second_signal_stops_at_once(
    runs: Runs, plain: Path, tmp_path: Path, number: int, status: int
) -> None:
    assert runs.train(tmp_path, signal=number, step=5, times=2)[0] == status
    assert not (tmp_path / "run/checkpoint-6").exists()
    verify(tmp_path / "run/checkpoint-4")
    assert runs.train(tmp_path, *GO_ON)[0] == 0
    assert outcome(tmp_path) == outcome(plain)


def test_other_settings_and_an_unfinished_run_are_refused(
    runs: Runs, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed / "run", tmp_path / "run")
    before = outcome(tmp_path)
    rows = (runs.root / "train.jsonl").read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(rows[:-1]))
    refused: Sequence[tuple[list[str], str]] = (
        ([], "holds an unfinished run, up to checkpoint-6"),
        ([*GO_ON, "--learning_rate", "1e-3"], "another learning_rate"),
        ([*GO_ON, "--seed", "1", "--train_file", str(other)], "another seed, train_file"),
    )
    for flags, message in refused:
        status, log = runs.train(tmp_path, *flags)
        assert status == 2
        assert message in log
        assert outcome(tmp_path) == before
    free = ["--logging_steps", "1", "--save_total_limit", "5", "--max_batch_tokens", "500"]
    status, log = runs.train(tmp_path, *GO_ON, *free, kill="step", step=6)
    assert status == -signal.SIGKILL, log
    changed = [*GO_ON, "--learning_rate", "1e-3", "--allow_changed"]
    assert runs.train(tmp_path, *changed)[0] == 0
    assert outcome(tmp_path) != before


def test_a_poisoned_row_ends_the_run_by_its_number(runs: Runs, tmp_path: Path) -> None:
    row = json.loads((runs.root / "train.jsonl").read_text().splitlines()[0])
    rows = [{**row, "query": f"topic {i}", "scores": {"positive": [9e37 if i == 9 else 1.0],
             "negative": [-9e37 if i == 9 else -1.0] * 3}} for i in range(16)]  # fmt: skip
    file = tmp_path / "poisoned.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, log = runs.train(tmp_path, "--train_file", str(file), "--loss", "distill",
                             "--distill_loss", "margin_mse")  # fmt: skip
    assert status == 2, log
    (line,) = [line for line in log.splitlines() if "is not finite" in line]
    numbers = line.split("saw rows ")[1].split(", counted")[0].split(", ")
    assert "10" in numbers
    assert len(numbers) == 2
    for left in (tmp_path / "run").glob("checkpoint-*"):
        verify(left)

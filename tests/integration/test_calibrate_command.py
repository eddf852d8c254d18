"""`finetune calibrate` from its file of judgments to its record, plot and last line."""

from __future__ import annotations

import json
import math
import random
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from qwen3_reranker.cli.main import main as rerank
from tests import fakes


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[fakes.FakeModel]:
    model = fakes.FakeModel()
    with fakes.loaded(monkeypatch, model):
        yield model


WORDS = ["red", "apple", "green", "pear", "blue", "plum"]


def judged(num_queries: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Candidates of which those that share words with the query are mostly the relevant ones."""
    rng = random.Random(seed)
    rows = []
    for i in range(num_queries):
        first, second, *others = rng.sample(WORDS, 6)
        texts = [
            f"{first} {second}", f"{first} {others[0]}", f"{others[1]} {second}",
            f"{others[0]} {others[1]}", f"{others[2]} {others[3]}",
        ]  # fmt: skip
        chances = [0.9, 0.4, 0.4, 0.05, 0.05]
        rows.append(
            {
                "query": f"{first} {second} {i}",
                "candidates": [
                    {"text": text, "label": 2 * (rng.random() < chance)}
                    for text, chance in zip(texts, chances, strict=True)
                ],
            }
        )
    return rows


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"query": row["query"], "document": each["text"], "label": each["label"]}
        for row in rows
        for each in row["candidates"]
    ]


@pytest.fixture
def calibrate(
    model: fakes.FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    def run(rows: list[dict[str, Any]], *options: str) -> tuple[dict[str, Any], list[str]]:
        folder = tmp_path / "calibration"
        file = write(tmp_path / "dev.jsonl", rows)
        arguments = ["--model", "model", "--eval_file", file, "--output_dir", str(folder)]
        assert main(["calibrate", *arguments, *options]) == 0
        record = json.loads((folder / "calibration.json").read_text())
        assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")
        return record, capsys.readouterr().out.splitlines()

    return run


def test_record_says_what_was_fitted_and_the_last_line_uses_it(
    calibrate: Callable[..., tuple[dict[str, Any], list[str]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    record, lines = calibrate(judged())
    assert record["after"]["log_loss"] < record["before"]["log_loss"]
    assert record["after"]["ece"] < record["before"]["ece"]
    assert record["model"] == {"name": "model", "adapter": None, "fingerprint": "of the fake"}
    fitted_on = record["fitted_on"]
    assert fitted_on["files"] == ["dev.jsonl"]
    assert (fitted_on["queries"], fitted_on["pairs"]) == (60, 300)
    threshold = record["threshold"]
    assert threshold["target"] == 0.9 <= threshold["precision"]
    assert any(
        line.startswith(f"score_threshold={threshold['score_threshold']:g} ") for line in lines
    )
    program, *command = shlex.split(lines[-1])
    assert program == "qwen3-reranker"
    assert command[-6:-4] == ["--threshold", f"{threshold['score_threshold']:g}"]
    command[-3:] = ["red apple", "red apple", "blue plum"]
    assert rerank(command) == 0
    assert "red apple" in capsys.readouterr().out


def test_labelled_pairs_are_read_as_well(
    calibrate: Callable[..., tuple[dict[str, Any], list[str]]],
) -> None:
    lists, _ = calibrate(judged())
    pairs, _ = calibrate(as_pairs(judged()))
    assert math.isclose(lists["temperature"], pairs["temperature"])
    assert lists["fitted_on"] == pairs["fitted_on"]


def test_label_from_which_a_document_is_relevant_is_a_setting(
    calibrate: Callable[..., tuple[dict[str, Any], list[str]]],
) -> None:
    rows = judged()
    for row in rows:
        row["candidates"][-1]["label"] = 1
    strict, _ = calibrate(rows, "--relevant_from", "2")
    loose, _ = calibrate(rows)
    assert strict["fitted_on"]["relevant"] < loose["fitted_on"]["relevant"]
    pairs, _ = calibrate(as_pairs(rows), "--relevant_from", "2")
    assert strict["temperature"] == pytest.approx(pairs["temperature"])


def test_precision_that_no_threshold_reaches_is_said(
    calibrate: Callable[..., tuple[dict[str, Any], list[str]]],
) -> None:
    record, lines = calibrate(judged(), "--precision", "0.999")
    assert record["threshold"] is None
    assert "No threshold reaches a precision of 0.999 with 20 documents or more; 0." in str(lines)
    assert "--threshold" not in lines[-1]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (judged(5), [], "calibrating needs 20 queries"),
        (judged(), ["--precision", "1"], "--precision must be between 0 and 1, got 1.0"),
        ([{"query": "q", "candidates": [{"text": "t"}]}], [], "has no labels"),
        ([], [], "has no rows"),
        ([{"query": "q"}], [], "1 fault"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_without_a_model(
    rows: list[dict[str, Any]],
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fakes.forbid_loading(monkeypatch)
    file = write(tmp_path / "dev.jsonl", rows)
    command = ["calibrate", "--model", "m", "--eval_file", file, "--output_dir", str(tmp_path)]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "calibration.json").exists()


def test_calibration_is_written_beside_the_adapter(
    model: fakes.FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "my adapter"
    adapter.mkdir()
    file = write(tmp_path / "dev.jsonl", judged())
    command = ["--model", "model", "--adapter", str(adapter), "--eval_file", file]
    assert main(["calibrate", *command]) == 0
    assert sorted(each.name for each in adapter.iterdir()) == [
        "calibration.json",
        "calibration.png",
    ]
    last = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert str(adapter / "calibration.json") in last

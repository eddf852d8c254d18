"""Training data from Parquet and the Hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.data import (
    TrainingGroup,
    read_training_file,
)
from qwen3_reranker import DataError, MissingExtraError
from tests.training_files import FLAG, OURS, PAIR, parquet, write


def test_parquet_columns_that_are_null_are_absent(tmp_path: Path) -> None:
    rows = [
        {
            **OURS,
            "instruction": "Find law",
            "note": None,
            "scores": {"positive": [3.0], "negative": [-1.0, 0.5]},
        },
        {**OURS, "query": "r"},
        {**OURS, "query": None},
        {**OURS, "query": "s", "note": "of this row alone"},
    ]
    path = parquet(tmp_path, rows, "odd [name]*.parquet")
    file = read_training_file(path, skip_bad=True)
    assert file.groups == [
        TrainingGroup("q", ["yes"], ["no", "never"], "Find law", [3.0, -1.0, 0.5]),
        TrainingGroup("r", ["yes"], ["no", "never"], None),
    ]
    assert file.rejected == [
        f"{path}:3: 'query' must be a string that is not blank, got nothing",
        f"{path}:4: unknown key 'note'; known are instruction, negative, positive, query, scores",
    ]
    assert file.num_rows + len(file.rejected) == file.num_lines == 4


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_parquet_scores_must_be_finite(tmp_path: Path, score: float) -> None:
    path = parquet(tmp_path, [{**FLAG, "pos_scores": [score], "neg_scores": [0.0, 1.0]}])
    with pytest.raises(DataError, match=rf"pos_scores\[0\] must be a finite number, got {score}"):
        read_training_file(path)


def test_parquet_labels_must_be_whole(tmp_path: Path) -> None:
    path = parquet(tmp_path, [{**PAIR, "label": float("nan")}, {**PAIR, "label": 1.0}])
    with pytest.raises(DataError, match=r"(?s)2 faults.*:1: 'label' .* got nan.*:2: .* got float"):
        read_training_file(path)


def test_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path, [OURS])
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match=r"^0 rows in"):
        read_training_file(path)


def test_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, OURS, name="train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet cannot be loaded: ArrowInvalid") as caught:
        read_training_file(path)
    assert caught.value.__cause__ is not None


def test_hub_name_is_loaded_with_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"  # what stands for a repository
    folder.mkdir()
    parquet(folder, [OURS], "train.parquet")
    parquet(folder, [{**OURS, "query": "r"}, {**OURS, "query": "s"}], "test.parquet")
    train = read_training_file(f"hf://{folder}")
    test = read_training_file(f"hf://{folder}:test", instruction="Find law")
    assert train.groups == [TrainingGroup("q", ["yes"], ["no", "never"], None)]
    assert [(group.query, group.instruction) for group in test.groups] == [
        ("r", "Find law"),
        ("s", "Find law"),
    ]
    row = json.dumps(OURS, sort_keys=True).encode() + b"\n"
    assert train.sha256 == hashlib.sha256(row).hexdigest() != test.sha256
    with pytest.raises(DataError, match="cannot be loaded: ValueError: Unknown split"):
        read_training_file(f"hf://{folder}:dev")


@pytest.mark.parametrize("path", ["train.parquet", "hf://name:train"])
def test_without_datasets_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    write(tmp_path, OURS, name="train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'Run: pip install "qwen3-reranker\[finetune\]"'):
        read_training_file(path)


def test_reading_json_lines_imports_no_framework(tmp_path: Path) -> None:
    path = write(tmp_path, OURS, {**OURS, "query": "other"})
    code = (
        "import sys; from finetune.data import read_training_file, describe, check_leaks; "
        f"groups = read_training_file({path!r}).groups; "
        "describe(groups); check_leaks(groups, {}); "
        "heavy = {'datasets', 'trl', 'torch', 'transformers', 'pyarrow', 'peft', 'pandas'}; "
        "sys.exit(str(heavy & set(sys.modules) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == ""

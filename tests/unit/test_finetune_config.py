from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config import RerankerArguments, read_yaml
from finetune.reading import paraphrases
from qwen3_reranker import DataError, InputError

KNOWN = ["train_file", "seed", "instruction"]


def fault(tmp_path: Path, content: str | bytes) -> str:
    file = tmp_path / "run.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        read_yaml(str(file), KNOWN)
    return str(caught.value).replace(str(file), "run.yaml")


def test_settings_become_arguments_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train_file: [a, b]\nseed: 007\ninstruction: no\n")
    found = read_yaml(str(file), KNOWN)
    assert found == ["--train_file", "a", "b", "--seed", "007", "--instruction", "no"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\n? [a]\n: b\n", "run.yaml:2: a setting's name must be a word. Write 'name: v"),
        ("? {a: b}\n", "run.yaml:1: a setting's name must be a word"),
        ("seed: " + "[" * 5000, "'run.yaml' is not YAML (RecursionError). Correct it."),
        ('seed: "\\UFFFFFFFF"\n', "'run.yaml' is not YAML (OverflowError). Correct it."),
        ("seed: 1\ninstruction: 'CANARY\n", "is not YAML at line 3, column 1: found unexpected"),
        ("seed: %CANARY\n", "is not YAML at line 1, column 7: found character ... that cannot"),
        ("seed: *CANARY\n", "is not YAML at line 1, column 7: found undefined alias ..."),
        (b"seed: \xff\n", "'run.yaml' cannot be read (UnicodeDecodeError)"),
        ("#" * 200_000, "'run.yaml' has more than 131072 bytes. Pass a file of settings."),
        ("x" * 1000 + ": 1", f"there is no setting '{'x' * 40}...'. See --help_all."),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_file_of_settings_is_told(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    found = fault(tmp_path, content)
    assert message in found
    assert "CANARY" not in found


NAMES = (
    "num_positives", "num_negatives", "max_length", "max_batch_tokens", "max_eval_queries",
    "relevant_from", "early_stopping_patience", "listwise_weight", "instruction_dropout",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 10**5000, float("inf")], ids=lambda value: type(value).__name__
)
def test_setting_that_no_machine_counts_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"--{name} must be") as caught:
        RerankerArguments(train_file=["a"], **{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [float("nan"), -0.5])
def test_weight_of_a_loss_is_a_number_from_0(value: float) -> None:
    with pytest.raises(InputError, match="--listwise_weight must be a number from 0, got"):
        RerankerArguments(train_file=["a"], listwise_weight=value)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "", "[]", '{"CANARY": 1}', '{"a": [["CANARY"]]}', '{"a": [], "a": []}',
     '{"a": ["\\ud83d"]}', "9" * 5000],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_file_that_holds_no_paraphrases_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "paraphrases.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"paraphrases\.json'") as caught:
        paraphrases(str(file))
    assert "CANARY" not in str(caught.value)

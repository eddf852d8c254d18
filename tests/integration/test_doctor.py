from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_reranker.cli.main import main


@pytest.mark.parametrize(
    "settings", [{}, {"tied": False}, {"architecture": "ForSequenceClassification"}], ids=str
)
def test_doctor_finds_a_good_model_healthy(
    checkpoint: Callable[..., Path], settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(checkpoint(**settings)), "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "bound 5e-05 for torch.float32: as it should be" in out
    assert "0.999498" in out


def test_doctor_calls_the_price_of_int8_no_fault(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(checkpoint()), "--dtype", "int8"]) == 0
    assert "the price of int8" in capsys.readouterr().out


def test_doctor_sees_a_wrong_head(
    checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwen3_reranker.model import loading

    def embedding_row(full: Any, tokenizer: Any) -> torch.Tensor:
        weight = full.get_input_embeddings().weight  # wrong where the head is not tied
        row: torch.Tensor = (weight[tokenizer.yes_id] - weight[tokenizer.no_id]).detach()
        return row

    monkeypatch.setattr(loading, "yes_no_row", embedding_row)
    assert main(["doctor", str(checkpoint(tied=False)), "--dtype", "float32"]) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_doctor_names_a_model_that_does_not_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err

"""Scores of judged lists that are kept on disk."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.output import only_run
from finetune.served import Served, saved_scores
from qwen3_reranker import Reranker
from qwen3_reranker.data.candidates import CandidateList


def test_two_comparisons_share_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"query": "q", "candidates": [{"text": "t", "label": 1}]}\n')
    with only_run(tmp_path):
        command = f"evaluate --model none --eval_file {lists} --output_dir {tmp_path}"
        assert main(shlex.split(command)) == 2
    assert f"another run writes to '{tmp_path}'" in capsys.readouterr().err


LISTS = {
    "first": [CandidateList("1", "rust", None, ["a", "b"], ["iron", "a language"], [1, 0], [])],
    "second": [
        CandidateList("2", "bread", "Find recipes", ["c"], ["flour and water"], [1], []),
        CandidateList("3", "nothing", None, [], [], [], [1]),
    ],
}


def test_interrupted_scoring_goes_on_after_the_last_whole_list(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    log_odds = Reranker.log_odds

    def counted(self: Reranker, query: str, *args: Any, **options: Any) -> Any:
        asked.append(query)
        return log_odds(self, query, *args, **options)

    monkeypatch.setattr(Reranker, "log_odds", counted)
    served = Served(str(checkpoint()))
    scores = saved_scores(served, LISTS, tmp_path)
    assert [[len(row) for row in rows] for rows in scores.values()] == [[2], [1, 0]]
    assert asked == ["rust", "bread", "nothing"]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    first, second, _ = whole.splitlines(keepends=True)
    for left, again in (
        (first + second[:5], ["bread", "nothing"]),  # killed within a line
        (first + second, ["nothing"]),
        (whole, []),
        (b"[0.", ["rust", "bread", "nothing"]),
    ):
        asked.clear()
        file.write_bytes(left)
        assert saved_scores(served, LISTS, tmp_path) == scores
        assert asked == again
        assert file.read_bytes() == whole

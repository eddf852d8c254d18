from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest

from finetune.report import concerns, summary_lines, write_report
from qwen3_reranker import MissingExtraError
from tests.reports import UNCLEAR, WORSE, a_report, a_set


def test_regressions_are_the_ten_worst() -> None:
    queries = [(f"q{i}", 0.5, 0.5 - i / 100) for i in range(20)] + [("up", 0.1, 0.9)]
    found = a_set(per_query=queries).regressions
    assert [query_id for query_id, _, _ in found] == [f"q{i}" for i in range(19, 9, -1)]
    assert a_set(per_query=[("same", 0.5, 0.5 - 1e-12), ("up", 0.1, 0.9)]).regressions == []


def test_concerns_name_losses_alarms_and_simpler_rankers() -> None:
    sets = [a_set("a", WORSE, heuristics={"given order": 0.5, "shortest first": 0.4}),
            a_set("b", alarms=["Yes-bias: much."]), a_set("c", UNCLEAR)]  # fmt: skip
    assert concerns(a_report(sets=sets, warnings=["given"])) == [
        "given",
        "a: nDCG@10 got worse by 0.100.",
        "a: 'given order' ranks with nDCG@10 0.500, runs/adapter with no more.",
        "b: Yes-bias: much.",
    ]
    assert concerns(a_report(warnings=[])) == []


def test_summary_lines_are_a_table_and_the_warnings() -> None:
    assert summary_lines(a_report()) == [
        "before after change [95 % interval]       p       W/T/L nDCG@10",
        " 0.512 0.600 +0.088 [+0.050, +0.120] 0.0001      20/8/2 legal.eval",
        " 0.600 0.610 +0.010 [-0.020, +0.040] 0.4000     11/8/11 guard code.eval",
        "! 3 documents were cut.",
    ]


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def test_summary_lines_fit_80_columns() -> None:
    sets = [
        a_set("名前" * 60, is_guard=True, alarms=["字" * 200, "a\x1b[31mb\n"]),
        a_set("x" * 200),
    ]
    lines = summary_lines(a_report(sets=sets, warnings=["y" * 300, "word " * 60]))
    assert max(map(columns, lines)) <= 80
    assert all(line.isprintable() for line in lines)
    assert " ".join(lines).count("word") == 60


def test_missing_matplotlib_is_named_and_the_figures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "qwen3-reranker\[finetune\]"'):
        write_report(tmp_path, a_report())
    assert (tmp_path / "report.json").exists()

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.metrics import Comparison, Reliability, ReliabilityBin
from finetune.report import Report, SetReport, concerns, summary_lines, write_report
from qwen3_reranker import MissingExtraError

HOSTILE = """<script>alert("x")</script>'"><img src=https://evil.example/x>&amp;{0}$x_1$"""
BETTER = Comparison(0.5123456789012345, 0.6, 0.0876543210987655, 0.05, 0.12, 0.0001, 20, 8, 2)
WORSE = Comparison(0.6, 0.5, -0.1, -0.15, -0.05, 0.0002, 2, 8, 20)
UNCLEAR = Comparison(0.6, 0.61, 0.01, -0.02, 0.04, 0.4, 11, 8, 11)
RELIABILITY = Reliability(
    0.125, [ReliabilityBin(0.0, 0.1, 90, 0.02, 0.1), ReliabilityBin(0.9, 1.0, 10, 0.95, 0.8)]
)
HISTORY = [
    {"step": 10, "loss": 0.7, "learning_rate": 1e-4},
    {"step": 10, "eval_dev_ndcg@10": 0.5, "eval_ndcg@10": 0.5},
    {"step": 20, "loss": 0.5},
    {"step": 20, "eval_dev_ndcg@10": 0.6, "eval_ndcg@10": 0.6},
    {"step": 20, "train_runtime": 12.5, "train_loss": 0.6},
]


def a_set(name: str = "legal.eval", main: Comparison = BETTER, **changes: Any) -> SetReport:
    queries = [(f"q{i}", 0.5, 0.5 + (i - 8) / 40) for i in range(30)]
    each = SetReport(
        name=name,
        is_guard=False,
        num_queries=30,
        metrics={"nDCG@10": main, "MRR@10": main},
        heuristics={"given order": 0.42, "shortest first": 0.2, "longest first": 0.1},
        reliability_before=RELIABILITY,
        reliability_after=RELIABILITY,
        alarms=[],
        per_query=queries,
    )
    return replace(each, **changes)


def a_report(**changes: Any) -> Report:
    report = Report(
        title="A run",
        base="org/base",
        tuned="runs/adapter",
        settings={"learning rate": "0.0001"},
        data=["train.jsonl: 100 rows, sha256 0123456789ab"],
        sets=[
            a_set(instruction={"right": 0.62, "default": 0.6, "wrong": 0.4}),
            a_set("code.eval", UNCLEAR, is_guard=True),
        ],
        history=HISTORY,
        warnings=["3 documents were cut."],
        next_step='qwen3-reranker rank --adapter runs/adapter -q "query" "document"',
    )
    return replace(report, **changes)


class Page(HTMLParser):
    """Elements, attributes and texts of a page; fails on tags that do not close in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def of(self, tag: str, key: str) -> list[str]:
        return [value for t, k, value in self.attributes if (t, k) == (tag, key)]


def page_of(tmp_path: Path, report: Report) -> Page:
    return Page(write_report(tmp_path, report).read_text(encoding="utf-8"))


def test_page_has_its_sections_in_order_and_every_figure_in_words(tmp_path: Path) -> None:
    page = page_of(tmp_path, a_report())
    titles = ["Result", "Learning curve", "Queries, from worst to best", "Is P(yes) a probability?",
              "Against rankers that read nothing", "Instructions", "All metrics", "Settings",
              "Data", "Warnings", "Queries that lost most", "Next"]  # fmt: skip
    assert [text for text in page.texts if text in titles] == titles
    assert page.tags["svg"] == 5  # a curve; per set, changes and reliability
    assert page.of("svg", "role") == ["img"] * 5
    assert all(page.of("svg", "aria-label"))
    assert page.of("html", "lang") == ["en"]
    assert page.of("meta", "name") == ["viewport"]


def test_page_begins_with_the_summary_table(tmp_path: Path) -> None:
    texts = page_of(tmp_path, a_report()).texts
    start = texts.index("Set")
    assert texts[start : start + 25] == [
        *["Set", "Queries", "Before", "After", "Difference [95 %]", "p", "W/T/L", "Verdict"],
        *["legal.eval", "30", "0.512", "0.600", "+0.088 [+0.050, +0.120]", "0.0001", "20/8/2"],
        *["better", "code.eval", "guard", "30", "0.600", "0.610", "+0.010 [-0.020, +0.040]"],
        *["0.4000", "11/8/11", "no clear difference"],
    ]


def test_tables_have_headers_for_rows_and_columns(tmp_path: Path) -> None:
    page = page_of(tmp_path, a_report())
    assert set(page.of("th", "scope")) == {"row", "col"}
    assert page.tags["th"] == len(page.of("th", "scope"))
    assert all(page.of("td", "data-label"))


def test_ids_are_unique_and_links_lead_to_them(tmp_path: Path) -> None:
    page = page_of(tmp_path, a_report(sets=[a_set(str(i)) for i in range(4)]))
    ids = Counter(value for _, key, value in page.attributes if key == "id")
    assert max(ids.values()) == 1
    targets = [value for _, key, value in page.attributes if key.endswith("href")]
    assert all(value[0] == "#" and value[1:] in ids for value in targets)
    clips = re.findall(r"url\(#([^)]*)\)", (tmp_path / "report.html").read_text())
    assert set(clips) <= set(ids)


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, a_report())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in text
    assert "@import" not in text
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    assert not [key for _, key, _ in page.attributes if key == "src" or key.startswith("on")]
    assert page.of("meta", "content")[1] == "default-src 'none';style-src 'unsafe-inline'"


def test_every_text_is_escaped(tmp_path: Path) -> None:
    hostile = a_set(
        HOSTILE,
        metrics={"nDCG@10": BETTER, HOSTILE: BETTER},
        heuristics={HOSTILE: 0.9},
        alarms=[HOSTILE],
        per_query=[(HOSTILE, 1.0, 0.0)],
        instruction={HOSTILE: 0.5},
        is_guard=True,
    )
    report = Report(
        HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE], [hostile, a_set("b")],
        [{"step": 1, f"eval_{HOSTILE}_ndcg@10": 0.5, "eval_ndcg@10": 0.4, "eval_b_ndcg@10": 0.3}],
        [HOSTILE], HOSTILE,
    )  # fmt: skip
    page = page_of(tmp_path, report)
    assert not {"script", "img"} & set(page.tags)
    assert not [key for _, key, _ in page.attributes if key == "src"]
    # Title, heading, names, settings, legend, tables, lists and command show it as it is.
    assert sum(HOSTILE in text for text in page.texts) >= 18


def test_escaping_is_what_keeps_scripts_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.report._esc", str)
    text = write_report(tmp_path, a_report(base="<script></script>")).read_text(encoding="utf-8")
    assert "<script>" in text


def test_json_round_trips_with_every_digit(tmp_path: Path) -> None:
    report = a_report()
    write_report(tmp_path, report)
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(dataclasses.asdict(report)))
    main = content["sets"][0]["metrics"]["nDCG@10"]
    assert Comparison(**main) == BETTER
    assert content["sets"][0]["per_query"][3] == ["q3", 0.5, 0.375]


def test_a_run_that_diverged_is_reported(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan, "grad_norm": math.inf}]
    page_of(tmp_path, a_report(history=history))
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["history"][1] == {"step": 2, "loss": None, "grad_norm": None}


def test_page_without_history_instruction_or_losses(tmp_path: Path) -> None:
    sets = [a_set(per_query=[("q", 0.5, 0.6)], num_queries=1)]
    page = page_of(tmp_path, a_report(history=[], sets=sets, warnings=[], settings={}, data=[]))
    for title in ("Learning curve", "Instructions", "Queries that lost most", "Settings", "Data"):
        assert title not in page.texts
    assert page.texts[page.texts.index("Warnings") + 1] == "None."


def test_page_without_sets_says_that_nothing_is_known(tmp_path: Path) -> None:
    report = a_report(sets=[], history=[{"step": 1, "loss": 0.5}])
    page = page_of(tmp_path, report)
    assert "No evaluation set was given, so what was gained is unknown." in page.texts
    assert page.tags["svg"] == 1
    assert any("No evaluation set" in line for line in summary_lines(report))


def test_learning_curve_names_sets_and_drops_a_mean_of_one(tmp_path: Path) -> None:
    assert "mean of the sets" not in page_of(tmp_path, a_report()).texts
    more = [{"step": 20, "eval_b_ndcg@10": 0.4}, {"step": 30, "eval_b_ndcg@10": 0.5}]
    texts = page_of(tmp_path, a_report(history=[*HISTORY, *more])).texts
    start = texts.index("nDCG@10 and loss by optimizer step")
    assert texts[start + 1 : start + 7] == ["●", "dev", "■", "mean of the sets", "▲", "b"]


def test_plots_take_the_colour_and_the_font_of_the_page(tmp_path: Path) -> None:
    text = write_report(tmp_path, a_report()).read_text(encoding="utf-8")
    plots = "".join(re.findall("(?s)<svg.*?</svg>", text))
    assert "currentColor" in plots
    assert "#000000" not in plots
    assert "DejaVu" not in plots
    assert "prefers-color-scheme:dark" in text


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_report(tmp_path / name, a_report()).read_bytes() for name in "ab")
    assert one == two


def test_many_queries_make_no_large_page(tmp_path: Path) -> None:
    queries = [(f"q{i}", 0.5, math.sin(i)) for i in range(20_000)]
    page = write_report(tmp_path, a_report(sets=[a_set(per_query=queries)]))
    assert page.stat().st_size < 150_000


def test_report_is_written_for_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "folder", a_report(tuned="runs/\udcff", title="报告"))
    text = (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8")
    assert "报告" in text
    assert "runs/&#56575;" in text


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

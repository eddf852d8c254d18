"""The page of a fine-tuning report, with the plots that matplotlib draws."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from finetune.metrics import Comparison
from finetune.report import Report, summary_lines, write_report
from tests.reports import BETTER, HISTORY, a_report, a_set

HOSTILE = """<script>alert("x")</script>'"><img src=https://evil.example/x>&amp;{0}$x_1$"""


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

"""What a training run gained, as one HTML page that needs nothing else, and as JSON.

Decides what a reader sees. Knows nothing of models or texts: queries appear by id. The page has no
script and loads nothing, and tells the browser to allow neither.
"""

from __future__ import annotations

import html
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_reranker.cli.terminal import WIDTH, fit
from qwen3_reranker.errors import MissingExtraError

from .metrics import METRICS, Comparison, Reliability
from .output import write_json

_MAIN = METRICS[0]
AFTER, BEFORE = "#2f7fc2", "#c4701a"
"""Their contrast is 3.6 or more with white and with the dark background."""
_LINES = [("o", "●", AFTER), ("s", "■", BEFORE), ("^", "▲", "#3f9457"), ("D", "◆", "#a765c0"),
          ("v", "▼", "#b07a10"), ("P", "✚", "#808080")]  # fmt: skip
"""Of the lines of a plot: marker, its likeness in the legend, colour."""
_COLUMNS = ["Before", "After", "Difference [95 %]", "p", "W/T/L"]
_NOTE = f"""<p class="note">Mean {_MAIN} before and after on the same candidates, equal scores
ordered worst first. Interval: paired bootstrap over queries. p: paired randomisation test,
two-sided, not corrected for several sets. W/T/L: queries won, tied and lost. Guard: a set of
another domain, where nothing should get worse.</p>"""
_CSS = """
:root{color-scheme:light dark}
body{font:1rem/1.5 system-ui,sans-serif;max-width:68rem;margin:auto;padding:1rem;background:#fff;
color:#1b1f24;overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:0}h2{margin-top:2.2rem;border-bottom:1px solid #8886}
h3{font-size:1rem;margin:1rem 0 .3rem}thead th,.note,figcaption{font-size:.85rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem .3rem 0}
tr{border-bottom:1px solid #8886}tbody th{font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:0 2rem}
figure{margin:1rem 0}svg{fill:currentColor;width:100%;max-width:34rem;height:auto}
.badge{border:1px solid;border-radius:.3rem;padding:0 .3rem;font-size:.8rem;font-weight:400}
pre,.bar{background:#8882}.bar{display:inline-block;width:45%;margin-left:.6rem}
.bar::after{content:"";display:block;height:.7em;width:var(--w);background:#2f7fc2}
.warn{border-left:.3rem solid;padding-left:.8rem}pre{padding:.8rem;white-space:pre-wrap}
@media(prefers-color-scheme:dark){body{background:#14171a;color:#e4e7ea}a{color:#7db8ea}}
@media(max-width:44rem){.wide thead{position:absolute;clip-path:inset(50%)}
.wide,.wide :is(tbody,tr,tbody th){display:block}.wide td{display:flex;padding:0}
.wide td::before{content:attr(data-label);flex:0 0 9.5rem;font-size:.85rem}}
"""


@dataclass(frozen=True, slots=True)
class SetReport:
    """One evaluation set before and after.

    Attributes:
        name: Name of the set.
        is_guard: Whether it is of another domain, where nothing should get worse.
        num_queries: Queries.
        metrics: By name of the metric, nDCG@10 among them.
        heuristics: nDCG@10 of rankers that read nothing.
        reliability_before, reliability_after: Of both models; None before, if there was none.
        alarms: What is wrong, in plain words.
        per_query: (query id, nDCG@10 before, nDCG@10 after) of every query.
        instruction: nDCG@10 by instruction given: "right", "default", "wrong".
    """

    name: str
    is_guard: bool
    num_queries: int
    metrics: dict[str, Comparison]
    heuristics: dict[str, float]
    reliability_before: Reliability | None
    reliability_after: Reliability
    alarms: list[str]
    per_query: list[tuple[str, float, float]]
    instruction: dict[str, float] | None = None

    @property
    def regressions(self) -> list[tuple[str, float, float]]:
        """The ten queries that lost most, worst first."""
        lost = [query for query in self.per_query if query[2] < query[1] - 1e-9]
        return sorted(lost, key=lambda query: query[2] - query[1])[:10]


@dataclass(frozen=True, slots=True)
class Report:
    """One training run: a heading, two names, settings by name, and what was found.

    Attributes:
        data: Lines on the data: hashes, counts, warnings.
        history: The Trainer's log: dicts with `step`, and `loss` or `eval_..._ndcg@10`.
        warnings: What a reader must know.
        next_step: A shell command.
    """

    title: str
    base: str
    tuned: str
    settings: dict[str, str]
    data: list[str]
    sets: list[SetReport]
    history: list[dict[str, Any]]
    warnings: list[str]
    next_step: str


class _Markup(str):
    """Text that is HTML already; any other is escaped."""


def write_report(folder: Path, report: Report) -> Path:
    """Write report.json, with every digit, and report.html; return the page.

    Numbers that are not finite, as the loss of a run that diverged, are null in the JSON.

    Raises:
        MissingExtraError: Without matplotlib; report.json is there then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finite = json.loads(json.dumps(asdict(report)), parse_constant=lambda _: None)
    write_json(folder / "report.json", finite)
    page = folder / "report.html"
    page.write_text(_page(report), encoding="utf-8", errors="xmlcharrefreplace")
    return page


def summary_lines(report: Report) -> list[str]:
    """Return the main result and every warning for a terminal of 80 columns."""
    lines = [f"before after change [95 % interval]       p       W/T/L {_MAIN}"]
    for each in report.sets:
        main = each.metrics[_MAIN]
        before, after, change, p, counts = _cells(main)
        name = f"{'guard ' if each.is_guard else ''}{each.name}"
        lines.append(f"{before:>6} {after} {change} {p} {counts:>11} {name}")
    for concern in concerns(report):
        lines += textwrap.wrap(concern, WIDTH - 2, initial_indent="! ", subsequent_indent="  ")
    return [fit(line) for line in lines]


def concerns(report: Report) -> list[str]:
    """Return the warnings of a run: those given, alarms, and sets that gained nothing."""
    found = list(report.warnings)
    if not report.sets:
        found.append("No evaluation set was given, so what was gained is unknown.")
    for each in report.sets:
        main = each.metrics[_MAIN]
        found += [f"{each.name}: {alarm}" for alarm in each.alarms]
        if _verdict(main) == "worse":
            found.append(f"{each.name}: {_MAIN} got worse by {-main.difference:.3f}.")
        found += [
            f"{each.name}: '{name}' ranks with {_MAIN} {value:.3f}, {report.tuned} with no more."
            for name, value in each.heuristics.items()
            if value >= main.mean_after
        ]
    return found


def _page(report: Report) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{_esc(report.title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';style-src 'unsafe-inline'">
<style>{_CSS}</style></head>
<body><h1>{_esc(report.title)}</h1><p>{_esc(report.base)} → {_esc(report.tuned)}</p>
<main>{"".join(_sections(report))}</main></body></html>
"""


def _sections(report: Report) -> Iterable[str]:
    found, sets = concerns(report), report.sets
    yield _section("Result", _summary(sets, len(found)))
    yield _section("Learning curve", _learning_curve(report.history))
    yield _section("Queries, from worst to best", *map(_differences, sets))
    yield _section("Is P(yes) a probability?", *map(_reliability, sets))
    yield _section("Against rankers that read nothing", *(_rivals(report, s) for s in sets))
    yield _section("Instructions", *(_bars("Given", s.name, s.instruction or {}) for s in sets))
    each = ((f"{s.name}, {name}", *_cells(c)) for s in sets for name, c in s.metrics.items())
    yield _section("All metrics", _table(["Set, metric", *_COLUMNS], each))
    yield _section("Settings", _table(["Setting", "Value"], report.settings.items()))
    yield _section("Data", _items(report.data))
    yield _section("Warnings", _items(found or ["None."]))
    yield _section("Queries that lost most", *map(_regressions, sets))
    yield _section("Next", f"<pre><code>{_esc(report.next_step)}</code></pre>")


def _section(title: str, *parts: str) -> str:
    body = [f"<div>{part}</div>" for part in parts if part]
    columns = ' class="grid"' if len(body) > 1 else ""
    head = f'<section id="{re.sub("[^a-z]+", "-", title.lower())}"><h2>{_esc(title)}</h2>'
    return f"{head}<div{columns}>{''.join(body)}</div></section>" if body else ""


def _summary(sets: Sequence[SetReport], num_warnings: int) -> str:
    rows = []
    for each in sets:
        main = each.metrics[_MAIN]
        name = f"{_esc(each.name)} " + '<span class="badge">guard</span>' * each.is_guard
        rows.append([_Markup(name), f"{each.num_queries}", *_cells(main), _verdict(main)])
    warned = f'<p class="warn"><a href="#warnings">Warnings: {num_warnings}</a></p>'
    table = _table(["Set", "Queries", *_COLUMNS, "Verdict"], rows)
    return table + warned * bool(num_warnings) + _NOTE * bool(rows)


def _rivals(report: Report, each: SetReport) -> str:
    main = each.metrics[_MAIN]
    models = {report.base: main.mean_before, report.tuned: main.mean_after}
    return _bars("Ranker", each.name, {**each.heuristics, **models})


def _bars(head: str, name: str, values: dict[str, float]) -> str:
    bar = '{:.3f} <span class="bar" style="--w:{:.1f}%" aria-hidden="true"></span>'
    rows = [(key, _Markup(bar.format(value, 100 * value))) for key, value in values.items()]
    return _named(name, _table([head, _MAIN], rows))


def _regressions(each: SetReport) -> str:
    rows = [(id, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}") for id, a, b in each.regressions]
    return _named(each.name, _table(["Query id", "Before", "After", "Difference"], rows))


def _named(name: str, table: str) -> str:
    return table and f"<h3>{_esc(name)}</h3>{table}"


def _cells(each: Comparison) -> list[str]:
    change = f"{each.difference:+z.3f} [{each.ci_low:+z.3f}, {each.ci_high:+z.3f}]"
    means = [f"{mean:.3f}" for mean in (each.mean_before, each.mean_after)]
    return [*means, change, f"{each.p_value:.4f}", f"{each.wins}/{each.ties}/{each.losses}"]


def _verdict(each: Comparison) -> str:
    if each.p_value > 0.05:
        return "no clear difference"
    return "better" if each.difference > 0 else "worse"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = ""
    for row in rows:
        body += f'<tr><th scope="row">{_esc(row[0])}</th>'
        for label, cell in zip(head[1:], row[1:], strict=True):
            body += f'<td data-label="{_esc(label)}">{_esc(cell)}</td>'
        body += "</tr>"
    titles = "".join(f'<th scope="col">{_esc(label)}</th>' for label in head)
    kind = ' class="wide"' * (len(head) > 2)
    table = f"<table{kind}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
    return table if body else ""


def _items(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_esc(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _esc(text: str) -> str:
    return text if isinstance(text, _Markup) else html.escape(text)


def _learning_curve(history: Sequence[dict[str, Any]]) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in history:
        for key, value in each.items():
            if re.fullmatch("loss|eval_(.*_)?ndcg@10", key):
                lines.setdefault(key, []).append((each["step"], value))
    losses = [lines.pop("loss")] if "loss" in lines else []
    if len(lines) == 2:  # one set, which is the mean
        lines.pop("eval_ndcg@10", None)
    both = ((_MAIN, list(lines.values())), ("loss", losses))
    panels = [(label, several) for label, several in both if several]

    def draw(figure: Any) -> None:
        stack = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (label, several) in zip(stack, panels, strict=True):
            for points, (marker, _, colour) in zip(several, cycle(_LINES), strict=False):
                axes.plot(*zip(*points, strict=True), marker=marker, ms=3, color=colour)
            axes.set_ylabel(label)
        axes.set_xlabel("optimizer step")

    legend = [key[len("eval_") : -len("_ndcg@10")] or "mean of the sets" for key in lines]
    return _figure(draw, f"{_MAIN} and loss by optimizer step", legend) if panels else ""


def _differences(each: SetReport) -> str:
    change = np.sort([after - before for _, before, after in each.per_query])
    picked = change[np.linspace(0, len(change) - 1, min(len(change), 500)).round().astype(int)]
    edges = np.linspace(0, 100, len(picked) + 1)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for part, colour in ((np.minimum(picked, 0), BEFORE), (np.maximum(picked, 0), AFTER)):
            axes.stairs(part, edges, fill=True, color=colour)
        axes.axhline(0, color="black", lw=0.6)
        axes.set(xlabel="% of the queries", ylabel=f"change of {_MAIN}")

    counts = _cells(each.metrics[_MAIN])[-1]
    return _figure(draw, f"{each.name}: {counts} queries won/tied/lost")


def _reliability(each: SetReport) -> str:
    sides = [("after", each.reliability_after)]
    if each.reliability_before is not None:
        sides.append(("before", each.reliability_before))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], "--", color="black", lw=0.6)
        for (_, side), (marker, _, colour) in zip(sides, _LINES, strict=False):
            x, y = zip(*((bin.mean_p_yes, bin.observed) for bin in side.bins), strict=True)
            axes.plot(x, y, marker=marker, ms=4, color=colour)
        axes.set(xlabel="mean P(yes)", ylabel="share that is relevant")

    legend = [f"{name}, expected calibration error {side.ece:.3f}" for name, side in sides]
    return _figure(draw, f"{each.name}: P(yes) against the share of relevant documents", legend)


def _figure(draw: Callable[[Any], None], text: str, legend: Sequence[str] = ()) -> str:
    """Return a plot as SVG in the page's own colours and font, with its caption."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of("a report", error.name, "finetune") from error
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": text, "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        draw(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, format="svg", transparent=True)
    svg = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>", "", file.getvalue())
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg)
    svg = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = svg.replace("#000000", "currentColor").replace("xlink:href", "href")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_esc(text)}"', 1)
    keys = "".join(
        f'<br><span style="color:{colour}" aria-hidden="true">{sign}</span> {_esc(label)}'
        for label, (_, sign, colour) in zip(legend, cycle(_LINES), strict=False)
    )
    return f"<figure>{svg}<figcaption>{_esc(text)}{keys}</figcaption></figure>"

"""What the web page shows: a ranking as HTML, its CSV, messages, examples.

Decides how results look. Every text of a user passes through `_escaped`. Knows nothing of Gradio.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..call.results import RankedDocument
from ..data.demo_corpus import read_corpus
from ..text.strings import repaired

CSS = Path(__file__).with_name("page.css")

SHOWN = 200
"""Documents on the page, which a browser lays out at once; the CSV has them all."""

TASKS = {
    "Default": ("",),
    "Law": ("Given a legal question, retrieve passages that state the rule which answers it",),
    "Code": ("Given a programming task, retrieve code that solves it",),
    "Medicine": ("Given a medical question, retrieve passages that answer it",),
    "Any language": ("Given a question, retrieve passages in any language that answer it",),
    "Fact check": ("Given a claim, retrieve passages that support or refute it",),
}
"""Task sentences to begin with, by the name on their button."""

_EXAMPLES = {
    "Ears on a plane": (2, "med-2 med-4 med-3 med-5 med-1"),
    "A musician's key": (5, "db-2 home-1 sport-1 music-4 music-1 music-2 db-1"),
    "A contract": (3, "law-5 law-3 fin-3 law-1 db-3"),
    "Python": (4, "db-8 sport-1 db-2 py-1 py-6"),
}
"""Number of the query and ids of the passages in the demo's corpus; none has a blank line in it."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")

_LONG = 320
"""Characters past which a document is folded, about four lines."""


def examples() -> dict[str, tuple[str, str, str]]:
    """Return query, instruction and documents of each example, by its name."""
    passages, queries = read_corpus()
    texts = {passage.id: passage.text for passage in passages}
    return {
        name: (
            queries[number].query,
            queries[number].instruction or "",
            "\n\n".join(texts[id] for id in ids.split()),
        )
        for name, (number, ids) in _EXAMPLES.items()
    }


def render_ranking(ranking: Sequence[RankedDocument], *, seconds: float, tokens: int | None) -> str:
    """Return a ranking as HTML, with a link that holds its CSV.

    Args:
        ranking: All documents, best first.
        seconds: Time it took.
        tokens: Tokens the model computed; None if that is not known.
    """
    truncated = sum(result.truncated for result in ranking)
    facts = [f"{_count(len(ranking), 'document')} in {seconds:.2f} s"]
    if tokens is not None:
        facts.append(_count(tokens, "token"))
    if truncated:
        facts.append(f"{truncated} cut")
    items = [_item(place, result) for place, result in enumerate(ranking[:SHOWN], 1)]
    rest = len(ranking) - len(items)
    more = [f"The CSV file has the other {_count(rest, 'document')} too."] if rest else []
    if truncated:
        more.append("Cut: the end of the document was not read.")
    notes = " ".join(["Bar and number: P(yes). It orders the documents of one query.", *more])
    return (
        f'<section class="ranking" aria-label="Ranking"><header><p>{" · ".join(facts)}</p>'
        f'<a download="ranking.csv" href="{_csv_link(ranking)}">Download CSV</a></header>'
        f"<ol>{''.join(items)}</ol><footer>{notes}</footer></section>"
    )


def render_title(name: str) -> str:
    """Return the head of the page.

    Args:
        name: What scores: a model's name or a server's address.
    """
    return (
        '<header class="title"><h1>Rerank</h1>'
        f"<p>Order documents by relevance with <b>{_escaped(name)}</b>.</p></header>"
    )


def render_message(message: str, *, is_error: bool = False) -> str:
    """Return a message as HTML in the place of a ranking."""
    role = "alert" if is_error else "note"
    return f'<p class="message" role="{role}">{_escaped(message)}</p>'


def to_csv(ranking: Sequence[RankedDocument]) -> str:
    """Return a ranking as CSV, which `read_documents` can read again.

    A text that a spreadsheet would run as a formula has an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rank", "was", "score", "log_odds", "truncated", "text"])
    for place, result in enumerate(ranking, 1):
        figures = (place, result.index + 1, result.score, result.log_odds, result.truncated)
        writer.writerow([*figures, _inert(repaired(result.document))])
    return text.getvalue()


def _inert(cell: str) -> str:
    """Return a cell that no spreadsheet runs (OWASP, CSV injection)."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _csv_link(ranking: Sequence[RankedDocument]) -> str:
    """Return the CSV as an address: nothing has to be kept on disk for a download."""
    content = to_csv(ranking).encode("utf-8-sig")  # a spreadsheet takes it for Latin-1 otherwise
    return "data:text/csv;base64," + base64.b64encode(content).decode()


def _item(place: int, result: RankedDocument) -> str:
    cut = '<span class="cut">cut</span>' if result.truncated else ""
    return (
        f'<li><span class="place">{place}</span>'
        f'<span class="bar"><span style="width:{result.score:.2%}"></span></span>'
        f'<span class="score" title="log-odds {result.log_odds:+.3f}">{result.score:.4f}</span>'
        f'<span class="was">was {result.index + 1} {_move(result.index + 1 - place)}</span>'
        f'<div class="text" dir="auto">{cut}{_folded(result.document)}</div></li>'
    )


def _move(places: int) -> str:
    if places == 0:
        return '<span class="same">=</span>'
    direction, sign = ("up", "▲") if places > 0 else ("down", "▼")
    arrow = f'<span role="img" aria-label="{direction}">{sign}</span>'
    return f'<span class="{direction}">{arrow}{abs(places)}</span>'


def _folded(document: str) -> str:
    """Return a document, the beginning of it alone until it is opened if it is long."""
    text = _escaped(document)
    if len(document) <= _LONG and document.count("\n") < 4:
        return text
    return f"<details><summary><span>{text}</span></summary></details>"


def _escaped(text: str) -> str:
    """Return HTML that shows a text and does nothing else."""
    return escape(repaired(text))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

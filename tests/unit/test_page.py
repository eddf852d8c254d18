from __future__ import annotations

import base64
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen3_reranker import RankedDocument
from qwen3_reranker.call.results import probability, rank_documents
from qwen3_reranker.data.demo_corpus import read_corpus
from qwen3_reranker.data.documents import read_documents, split_documents
from qwen3_reranker.text.prompt import TEMPLATES
from qwen3_reranker.ui import page

HOSTILE = [
    "<script>alert(1)</script>",
    "</div></li></ol><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "&lt;b&gt; & <b>",
    "'><svg/onload=alert(1)>",
    "</summary>" + "x" * 400,
]


class Page(HTMLParser):
    """Elements in the order they begin, texts, and whether every element ends."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self.open.append(attributes.get("class") or tag)
        self.texts.setdefault(self.open[-1], []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for name in set(self.open):
            self.texts[name][-1] += data

    def attributes(self, name: str) -> list[str]:
        held = [item for _, attributes in self.elements for item in attributes.items()]
        return [value or "" for key, value in held if key == name]


def ranked(documents: list[str], log_odds: list[float] | None = None) -> list[RankedDocument]:
    log_odds = log_odds or [float(i) for i in range(len(documents))]
    none = [None] * len(documents)
    scores = [probability(value) for value in log_odds]
    return rank_documents(documents, scores, log_odds, [False] * len(documents), none)


def rendered(ranking: list[RankedDocument], tokens: int | None = 1234) -> Page:
    return Page(page.render_ranking(ranking, seconds=0.456, tokens=tokens))


def test_ranking_shows_places_scores_and_moves() -> None:
    shown = rendered(ranked(["a", "b", "c"], [0.0, -3.0, 2.0]))
    assert shown.texts["place"] == ["1", "2", "3"]
    assert shown.texts["text"] == ["c", "a", "b"]
    scores = [probability(log_odds) for log_odds in (2.0, 0.0, -3.0)]
    assert shown.texts["score"] == [f"{score:.4f}" for score in scores]
    assert shown.attributes("style") == [f"width:{score:.2%}" for score in scores]
    assert shown.texts["was"] == ["was 3 ▲2", "was 1 ▼1", "was 2 ▼1"]
    assert "log-odds -3.000" in shown.attributes("title")


def test_place_that_did_not_change_is_equal() -> None:
    assert rendered(ranked(["a", "b"], [1.0, 0.0])).texts["was"] == ["was 1 =", "was 2 ="]


def test_head_tells_time_and_tokens_where_they_are_known() -> None:
    (head,) = rendered(ranked(["a", "b"])).texts["p"]
    assert head == "2 documents in 0.46 s · 1,234 tokens"
    (head,) = rendered(ranked(["a"]), tokens=None).texts["p"]
    assert head == "1 document in 0.46 s"


def test_cut_documents_are_marked_and_explained() -> None:
    ranking = rank_documents(["a", "b"], [0.5, 0.7], [0.0, 1.0], [True, False], [None, None])
    shown = rendered(ranking)
    assert shown.texts["text"] == ["b", "cuta"]
    assert shown.texts["p"] == ["2 documents in 0.46 s · 1,234 tokens · 1 cut"]
    assert "the end of the document was not read" in shown.texts["footer"][0]
    assert "not read" not in rendered(ranked(["a"])).texts["footer"][0]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_shown_and_never_run(text: str) -> None:
    plain = rendered(ranked(["a" * len(text)]))
    shown = rendered(ranked([text]))
    assert [tag for tag, _ in shown.elements] == [tag for tag, _ in plain.elements]
    assert shown.texts["text"] == [text]
    for html in (page.render_message(text, is_error=True), page.render_title(text)):
        assert {tag for tag, _ in Page(html).elements} <= {"p", "b", "h1", "header"}
        assert any(text in shown for texts in Page(html).texts.values() for shown in texts)


def test_half_a_character_is_replaced() -> None:
    html = page.render_ranking(ranked(["a \ud83d"]), seconds=1, tokens=1)
    assert "a \ufffd" in html
    html.encode()


def test_long_documents_are_folded() -> None:
    shown = rendered(ranked(["short", "x" * 1000, "1\n2\n3\n4\n5\n6"]))
    assert len(shown.texts["details"]) == 2
    assert shown.texts["text"] == ["1\n2\n3\n4\n5\n6", "x" * 1000, "short"]


def test_page_has_the_first_and_the_csv_has_all() -> None:
    documents = [f"d{i}" for i in range(page.SHOWN + 5)]
    html = page.render_ranking(ranked(documents), seconds=1, tokens=1)
    shown = Page(html)
    assert len(shown.texts["li"]) == page.SHOWN
    assert "has the other 5 documents too" in shown.texts["footer"][0]
    (link,) = shown.attributes("href")
    content = base64.b64decode(link.partition("base64,")[2]).decode()
    assert content.count("\n") == len(documents) + 1


def test_csv_can_be_ranked_again(tmp_path: Path) -> None:
    documents = ['a, "b"\n\nc', "", "=1+1", "🍞", "\r\n"]
    ranking = ranked(documents)
    (link,) = rendered(ranking).attributes("href")
    file = tmp_path / "ranking.csv"
    file.write_bytes(base64.b64decode(link.partition("base64,")[2]))
    again = [document.text for document in read_documents(str(file))]
    # But for line ends, and the apostrophe before what a spreadsheet would run.
    assert again == ["'\n", "🍞", "'=1+1", "", 'a, "b"\n\nc']
    assert page.to_csv(ranking).splitlines()[0] == "rank,was,score,log_odds,truncated,text"
    assert page.to_csv(ranking[:1]).splitlines()[1].startswith("1,5,0.98201379003790")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"])
def test_csv_has_no_formula(start: str) -> None:
    row = next(csv.DictReader(io.StringIO(page.to_csv(ranked([f"{start}1+1"], [-2.5])))))
    assert row["text"].startswith(f"'{start}")
    assert row["log_odds"] == "-2.5"  # a number of ours stays one


def test_csv_leaves_other_texts_alone() -> None:
    for text in ("tea", "a=1", "'=1", " =1", "1-1", ""):
        assert next(csv.DictReader(io.StringIO(page.to_csv(ranked([text])))))["text"] == text


def test_message_says_what_is_wrong() -> None:
    assert Page(page.render_message("x", is_error=True)).attributes("role") == ["alert"]
    assert Page(page.render_message("x")).attributes("role") == ["note"]


def test_examples_are_split_into_whole_passages() -> None:
    passages = {passage.text for passage in read_corpus()[0]}
    for query, instruction, documents in page.examples().values():
        assert query.strip()
        assert instruction == instruction.strip()
        assert set(split_documents(documents)) <= passages
        assert len(split_documents(documents)) >= 5


def test_tasks_are_sentences_for_a_prompt() -> None:
    for (sentence,) in page.TASKS.values():
        assert sentence not in {template.default_instruction for template in TEMPLATES.values()}
        assert re.fullmatch(r"(Given .*[^.])?", sentence)


def test_style_asks_for_nothing() -> None:
    assert not re.search(r"url\(|@import|http", page.CSS.read_text())

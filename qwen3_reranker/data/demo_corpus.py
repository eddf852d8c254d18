"""A small corpus with queries, written for the demo and the page.

Decides nothing: the texts are in `demo.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Query:
    """A query and the ids of the passages that answer it."""

    query: str
    instruction: str | None
    relevant: list[str]


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage of the corpus."""

    id: str
    text: str


def read_corpus() -> tuple[list[Passage], list[Query]]:
    """Return the passages and the queries."""
    content = json.loads(files(__package__).joinpath("demo.json").read_text(encoding="utf-8"))
    passages = [Passage(**passage) for passage in content["passages"]]
    return passages, [Query(**query) for query in content["queries"]]


def read_sample() -> tuple[str, list[str]]:
    """Return a query and 24 passages, some of which answer it."""
    passages, queries = read_corpus()
    return queries[0].query, [passage.text for passage in passages[:24]]

"""The demo shows what it says, with any model."""

from __future__ import annotations

import builtins
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_reranker.cli.demo import CANDIDATES, embed
from qwen3_reranker.cli.main import main
from qwen3_reranker.data.demo_corpus import read_corpus


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def test_corpus_is_whole() -> None:
    passages, queries = read_corpus()
    ids = [passage.id for passage in passages]
    assert len(set(ids)) == len(ids) >= 40
    assert len({query.query for query in queries}) >= 8
    assert all(set(query.relevant) <= set(ids) and query.relevant for query in queries)
    assert any(not query.query.isascii() for query in queries)
    twice = [q for q in queries if [p.query for p in queries].count(q.query) == 2]
    assert len({query.instruction for query in twice}) == 2
    assert not set(twice[0].relevant) & set(twice[1].relevant)


def test_first_stage_finds_what_answers_but_seldom_first() -> None:
    passages, queries = read_corpus()
    vectors = np.array([embed(passage.text) for passage in passages])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    firsts = 0
    for query in queries:
        order = np.argsort(-(vectors @ np.array(embed(query.query))), kind="stable")[:CANDIDATES]
        found = [passages[i].id for i in order]
        assert set(query.relevant) <= set(found)
        firsts += found[0] in query.relevant
    assert firsts < len(queries) / 3
    assert embed("") == [0.0] * len(embed("a"))


@pytest.mark.parametrize("arguments", [[], ["--dtype", "float32", "--device", "cpu"]])
def test_demo_runs_with_any_model(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(["demo", "--model", str(checkpoint()), *arguments]) == 0
    out = capsys.readouterr().out
    passages, queries = read_corpus()
    assert f"{len(passages)} passages, {len(queries)} queries" in out
    assert out.count("  now  was ") == len(queries)
    assert "ContextualCompressionRetriever" in out
    assert "VectorStoreIndex" in out
    temporary_name = str(checkpoint())
    assert all(columns(line) <= 80 for line in out.splitlines() if temporary_name not in line)


def test_demo_of_the_embedded_model_improves_the_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    figures = re.search(r"first\s+stage\s+(\S+),\s+reranked\s+(\S+)", out)
    assert figures is not None
    before, after = map(float, figures.groups())
    assert after > before + 0.1
    assert out.index("qwen3-reranker demo --model Qwen/Qwen3-Reranker-0.6B") > out.index("Next")
    assert max(map(columns, out.splitlines())) <= 80


def test_demo_without_its_extra_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "" and "demo" in (rest[2] or ()):
            raise ModuleNotFoundError(
                "No module named 'langchain_classic'", name="langchain_classic"
            )
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "the demo needs langchain_classic, which is not installed. Run: "
        'pip install "qwen3-reranker[demo]"\n'
    )

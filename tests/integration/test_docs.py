"""Errors that the documentation shows are the errors that come, and its links lead somewhere."""

from __future__ import annotations

import json
import pydoc
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.data import read_training_file
from qwen3_reranker import Qwen3RerankerError, RemoteReranker, Reranker

ROOT = Path(__file__).parents[2]
CASES = re.findall(
    r"^```python\n(.*?)```\n\n```text\n(.*?)```",
    (ROOT / "docs/errors.md").read_text(encoding="utf-8"),
    re.DOTALL | re.MULTILINE,
)


PAGES = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"),
    *ROOT.glob("recipes/*.md"),
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files_and_titles(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), name
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub("[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in slugs, f"{name}#{anchor}"


def test_navigation_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r"[\w/-]+\.md", nav)
    assert len(listed) == len(set(listed))
    docs = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    others = {str(page.relative_to(ROOT)) for page in PAGES if "docs" not in page.parts}
    assert set(listed) == docs | (others - {"README.md"}) | {"index.md"}


def test_warnings_fail_the_site() -> None:
    (command,) = re.findall("mkdocs build.*", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert "--strict" in command
    assert "--quiet" not in command  # it hides warnings before --strict counts them


def test_api_pages_name_what_there_is() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    names = [name for text in pages for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    assert len(names) > 10
    for name in names:
        assert pydoc.locate(name) is not None, name


def test_every_case_is_found() -> None:
    assert len(CASES) == (ROOT / "docs/errors.md").read_text().count("```python")


@pytest.mark.parametrize(("code", "expected"), CASES, ids=[code.strip() for code, _ in CASES])
def test_error_is_the_one_shown(
    code: str,
    expected: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("train.jsonl").write_text(
        '{"query": "q", "positive": ["a"], "negative": ["b"]}\n'
        '{"query": "q", "positives": ["a"]}\n'
        '{"query": "", "positive": ["a"], "negative": ["a"]}\n'
    )
    relabelled = shutil.copytree(checkpoint(), "relabelled")
    config = json.loads(Path(relabelled, "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}
    Path(relabelled, "config.json").write_text(json.dumps(config))
    names = {
        "Reranker": Reranker, "RemoteReranker": RemoteReranker, "MODEL": str(checkpoint()),
        "RELABELLED": relabelled, "read_training_file": read_training_file,
    }  # fmt: skip
    with Reranker(str(checkpoint())) as reranker, pytest.raises(Qwen3RerankerError) as caught:
        eval(code, {**names, "reranker": reranker})  # noqa: S307
    assert f"{caught.type.__name__}: {caught.value}" == expected.strip()

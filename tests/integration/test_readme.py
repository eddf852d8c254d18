"""README.md and the guides: whatever they show runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from finetune.cli import main as finetune
from qwen3_reranker import ClosedError
from qwen3_reranker.call.results import probability
from qwen3_reranker.cli.main import main
from tests.judgments import write_judgments
from tests.servers import serving

ROOT = Path(__file__).parents[2]
GUIDES = sorted(set(ROOT.glob("docs/**/*.md")) - {ROOT / "docs/errors.md"})  # test_docs.py runs it
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *GUIDES, ROOT / "recipes/README.md")
}
FENCES = [
    (page, language, code)
    for page, text in PAGES.items()
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
]
FOLDERS = ("qwen3_reranker", "finetune", "benchmarks", "recipes", "tests")
MODEL = "Qwen/Qwen3-Reranker-0.6B"
SERVER = "http://127.0.0.1:8012"
ALL_BLOCKS = [(page, code) for page, language, code in FENCES if language == "python"]
RAY = "import ray\n"  # runs in test_bulk_ray.py
BLOCKS = [each for each in ALL_BLOCKS if SERVER not in each[1] and RAY not in each[1]]
SERVER_BLOCKS = [code for _, code in ALL_BLOCKS if SERVER in code]
OUTPUTS = [(page, code) for page, language, code in FENCES if language == "text"]
LINES = [
    (page, re.sub("  +#.*", "", line))
    for page, language, code in FENCES
    for line in code.splitlines()
    if not language
]


def shown(start: str) -> list[str]:
    """Return the lines of all pages that start so, each once, README's first."""
    return list(dict.fromkeys(line for _, line in LINES if line.startswith(start)))


CURL_COMMANDS = shown("curl ")
COMMANDS = shown("qwen3-reranker ")
# The one with --benchmark runs in test_benchmark.py, where mteb's data are replaced.
FINETUNE_COMMANDS = [line for line in shown("qwen3-finetune ") if "--benchmark" not in line]
TARGETS = shown("make ")
INSTALLS = shown("pip install ")


@pytest.mark.parametrize("block", [code for _, code in BLOCKS], ids=[page for page, _ in BLOCKS])
def test_python_block_runs(block: str, checkpoint: Callable[..., Path]) -> None:
    # The published weights are replaced by a tiny model of the same architecture.
    assert MODEL in block
    assert max(map(len, block.splitlines())) <= 100
    code = block.replace(MODEL, str(checkpoint()))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(
    command: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gzip
    import lzma

    monkeypatch.chdir(tmp_path)
    with gzip.open("passages.jsonl.gz", "wt") as file:
        file.write('{"text": "tea"}\n{"text": "Beijing"}\n')
    with lzma.open("retrieved.jsonl.xz", "wt") as file:
        file.write(
            '{"query": "q", "candidates": [{"text": "a", "label": 1}, {"text": "b", "label": 0}]}\n'
        )
    if command.startswith("qwen3-reranker serve"):
        pytest.skip("runs below, with the clients shown")
    if command.startswith("qwen3-reranker ui"):
        pytest.skip("runs in test_ui.py, with a browser")
    if "--adapter" in command:
        pytest.skip("runs with the fine-tuning commands below")
    arguments = shlex.split(command.replace(MODEL, str(checkpoint())))[1:]
    if arguments[0] not in ("doctor", "vllm-command"):
        arguments += ["--model", str(checkpoint())]
    assert main(arguments) == 0


def test_fine_tuning_commands_run_one_after_the_other(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"query": "capital", "positive": ["Beijing"], "negative": ["tea", "rain"]}
    Path("labelled.jsonl").write_text(f"{json.dumps(row)}\n")
    Path("corpus.jsonl").write_text('{"text": "Beijing"}\n{"text": "capital letters"}\n')
    candidates = [{"text": "Seoul", "label": 1}, {"text": "tea", "label": 0}]
    Path("dev.jsonl").write_text(json.dumps({"query": "city", "candidates": candidates}) + "\n")
    (with_adapter,) = [command for command in COMMANDS if "--adapter" in command]
    for command in [*FINETUNE_COMMANDS, f"{with_adapter} --model {MODEL}"]:
        if " calibrate " in command:
            write_judgments(Path("judged.jsonl"), checkpoint(), adapter="my-reranker")
        program, *arguments = shlex.split(command.replace(MODEL, str(checkpoint())))
        assert {"qwen3-finetune": finetune, "qwen3-reranker": main}[program](arguments) == 0


def test_web_application_shown_answers(checkpoint: Callable[..., Path]) -> None:
    (block,) = [code for _, code in BLOCKS if "FastAPI" in code]
    names: dict[str, Any] = {}
    exec(block.replace(MODEL, str(checkpoint())), names)  # noqa: S102
    with TestClient(names["app"]) as client:
        answer = client.post("/search", params={"query": "tea"}, json=["rain", "tea", "a", "b"])
        assert sorted(answer.json()) == [0, 1, 2, 3]
    with pytest.raises(ClosedError):
        names["reranker"].rank("tea", ["rain"])


def test_server_answers_the_clients_shown(checkpoint: Callable[..., Path]) -> None:
    (command,) = [command for command in COMMANDS if " serve " in command]
    _, _, model, *options = shlex.split(command)
    assert model == MODEL
    with serving(checkpoint(), *options) as server:
        for command in CURL_COMMANDS:
            arguments = shlex.split(command.replace(SERVER, server.url))
            done = subprocess.run(arguments, capture_output=True, check=True)
            assert [r["index"] for r in json.loads(done.stdout)["results"]] in ([0, 1], [1, 0])
        for block in SERVER_BLOCKS:
            code = block.replace(SERVER, server.url)
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", code], capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert b"RankedDocument(index=" in done.stdout


def test_pages_show_what_is_run_here_and_nothing_else() -> None:
    assert sum(text.count("```") for text in PAGES.values()) == 2 * len(FENCES)
    assert {language for _, language, _ in FENCES} == {"python", "text", ""}
    assert [page for page, _ in BLOCKS] == ["README.md"] * 3 + [
        "docs/concurrency.md", "docs/frameworks.md",
    ]  # fmt: skip
    assert [page for page, code in ALL_BLOCKS if SERVER in code] == ["docs/serving.md"]
    assert [page for page, code in ALL_BLOCKS if RAY in code] == ["docs/bulk.md"]
    assert len(ALL_BLOCKS) == 7
    assert (len(CURL_COMMANDS), len(COMMANDS), len(FINETUNE_COMMANDS)) == (1, 10, 7)
    assert [page for page, line in LINES if "--benchmark" in line] == [
        "docs/finetuning/evaluate.md"
    ]
    run = {*CURL_COMMANDS, *COMMANDS, *shown("qwen3-finetune "), *TARGETS, *INSTALLS}
    others = [line.split()[0] for _, line in LINES if line not in run]
    assert others == ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"]  # a layout of files


def test_readme_is_a_door() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 160
    assert "```python" in lines[:30]
    assert {"make demo", "make test"} <= set(lines)


def test_extras_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = re.findall(r"^\| (`.*?) \|", PAGES["docs/install.md"], re.MULTILINE)
    named = re.findall(r"`([\w-]+)`", " ".join(table))
    named += [name for line in INSTALLS for name in re.findall(r"[\w-]+", "".join(
        re.findall(r"\[(.*)\]", line)))]  # fmt: skip
    assert len(named) > 15
    assert set(named) <= set(project["optional-dependencies"])


def test_printed_output_is_that_of_the_published_weights() -> None:
    # The log-odds that the tests of sentence-transformers have for them; see test_goldens.py.
    published = {0: -3.109298, 1: 7.120390, 2: 3.541637}
    documents = re.findall(r'^    "(.*)",$', BLOCKS[0][1], re.MULTILINE)
    ranked = sorted(published, key=lambda index: -published[index])
    expected = [f"{i} {round(probability(published[i]), 3)} {documents[i]}" for i in ranked[:2]]
    assert [(page, text.splitlines()) for page, text in OUTPUTS] == [("README.md", expected)]


def test_make_targets_and_files_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in TARGETS:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
    for text in PAGES.values():
        for target in re.findall(r"`make (\w+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for name in re.findall(r"\b(\w+\.py)\b", text):
            assert [file for folder in FOLDERS for file in (ROOT / folder).rglob(name)], name

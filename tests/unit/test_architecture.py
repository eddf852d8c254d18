"""Who may import whom, and what must stay light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH_FILES = {
    "adapters.py",
    "attention.py",
    "causal.py",
    "checkpoint.py",
    "cpu.py",
    "doctor.py",
    "layers.py",
    "loading.py",
    "model.py",
    "prepacked.py",
    "quantised.py",
    "varlen.py",
}
FIRST_PARTY = {"finetune", "langchain_qwen3_reranker", "llama_index", "tests", "benchmarks"}


def imports(file: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return files


def test_core_imports_nothing_else_of_this_repository() -> None:
    for file in sources("qwen3_reranker"):
        if file.name == "demo.py":  # shows the integrations
            continue
        found = {name.split(".")[0] for name in imports(file)} & FIRST_PARTY
        assert not found, f"{file.name} imports {found}"


def test_torch_is_imported_in_few_files() -> None:
    users = {
        file.name
        for file in sources("qwen3_reranker")
        if {"torch", "transformers"}
        & {name.split(".")[0] for name in imports(file, top_level_only=True)}
    }
    assert users == TORCH_FILES


def test_integrations_import_core_and_their_framework_only() -> None:
    for file in sources("integrations"):
        for name in imports(file):
            assert name.split(".")[0] not in {"finetune", "torch", "transformers", "tests"}


def test_finetune_imports_itself_relatively() -> None:
    # A user's own folder `finetune` would hide ours from an absolute import.
    for file in sources("finetune"):
        assert "finetune" not in {name.split(".")[0] for name in imports(file)}


def test_shelf_holds_packages_only() -> None:
    assert not list((ROOT / "integrations").glob("*.py"))
    assert not (ROOT / "integrations/llama_index/__init__.py").exists()
    assert not (ROOT / "integrations/llama_index/postprocessor/__init__.py").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import qwen3_reranker",
        "import qwen3_reranker; qwen3_reranker.Reranker('some/model')",
        "import qwen3_reranker.cli.main",
        "import finetune.cli",
    ],
)
def test_import_and_construction_load_no_torch(code: str) -> None:
    check = "import sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}; {check}"], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_import_leaves_the_process_alone() -> None:
    code = (
        "import logging, os, threading, warnings; before = dict(os.environ); "
        "import qwen3_reranker.reranker; "
        "assert dict(os.environ) == before; assert not logging.root.handlers; "
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names_are_these() -> None:
    import qwen3_reranker

    assert sorted(qwen3_reranker.__all__) == sorted(
        [
            "TEMPLATES",
            "Calibration",
            "ClosedError",
            "DataError",
            "DocumentTooLargeError",
            "InputError",
            "MissingExtraError",
            "ModelLoadError",
            "NonFiniteScoreError",
            "OverloadedError",
            "PromptTemplate",
            "Qwen3RerankerError",
            "RankedDocument",
            "RankingError",
            "ReentryError",
            "RemoteError",
            "RemoteProtocolError",
            "RemoteReranker",
            "Reranker",
            "Scorer",
            "TimedOutError",
            "Usage",
            "__version__",
        ]
    )
    for name in qwen3_reranker.__all__:
        assert getattr(qwen3_reranker, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qwen3_reranker.nothing


@pytest.mark.parametrize("folder", ["qwen3_reranker", "finetune", "benchmarks", "tests", "recipes"])
def test_what_is_imported_of_this_repository_exists(folder: str) -> None:
    for file in sources(folder):
        for name in set(imports(file)):
            # Other people's rerankers are in LlamaIndex's namespace, too.
            if name.split(".")[0] in FIRST_PARTY - {"llama_index"} | {"qwen3_reranker"}:
                assert importlib.util.find_spec(name), f"{file.name} imports {name}"

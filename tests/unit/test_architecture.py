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
ROOMS = {
    "text": "",
    "data": "",
    "call": "text data",
    "engine": "text call",
    "checkpoint": "text data",
    "model": "text engine checkpoint",
    "top": "text data call engine checkpoint model",
    "client": "text call",
    "web": "",
    "server": "top text call engine web",
    "ui": "top text data call web",
    "cli": "top text data call checkpoint model client web server ui",
}
"""Each room of the core and the rooms it may import, beside `errors`. "top" is what lies outside of
rooms: `reranker`, `runtime`, `bulk`, `framework_settings`. Settings of the frameworks import a
client when one is asked for."""
LATE = {("top", "client")}
"""Arrows that are followed inside a function, because the caller asked for it."""
TORCH_ROOMS = {"checkpoint", "model"}
TORCH_FILES = {"cli/doctor.py"}
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


def room_of(module: str) -> str:
    """Return the room of a module of the core, by its name within the core."""
    first = module.partition(".")[0]
    return first if first in ROOMS else "errors" if first == "errors" else "top"


def arrows(*, top_level_only: bool) -> dict[tuple[str, str], set[str]]:
    """Return the files behind each arrow from room to room."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in sources("qwen3_reranker"):
        if file.name in ("__init__.py", "__main__.py"):
            continue
        path = file.relative_to(ROOT / "qwen3_reranker")
        here = room_of(".".join(path.with_suffix("").parts))
        for name in imports(file, top_level_only=top_level_only):
            dots = len(name) - len(name.lstrip("."))
            if dots == 0:
                continue
            parts = (*path.parts[: len(path.parts) - dots], *filter(None, [name.lstrip(".")]))
            there = room_of(".".join(parts)) if parts else "errors"  # the version
            if there not in (here, "errors"):
                found.setdefault((here, there), set()).add(str(path))
    return found


def test_rooms_import_downwards_only() -> None:
    """Each of `ROOMS` imports earlier ones only, so that there is no circle."""
    allowed = {(room, there) for room, may in ROOMS.items() for there in may.split()}
    order = list(ROOMS)
    assert all(order.index(there) < order.index(room) for room, there in allowed)
    for (room, there), files in sorted(arrows(top_level_only=True).items()):
        print(f"{room:>10} -> {there:<10} {len(files)}")
        assert (room, there) in allowed, f"{room} may not import {there}: {files}"
    for arrow, files in arrows(top_level_only=False).items():
        assert arrow in allowed | LATE, f"{arrow} inside a function: {files}"


@pytest.mark.parametrize("package", ["qwen3_reranker", "finetune"])
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    """Neither at the top nor inside of functions."""
    folder = ROOT / package
    modules = {
        ".".join(file.relative_to(folder).with_suffix("").parts) for file in sources(package)
    }
    wanted: dict[str, set[str]] = {}
    for file in sources(package):
        here = file.relative_to(folder).with_suffix("").parts
        if here[-1] != "__init__":  # the package's own names its public ones
            wanted[".".join(here)] = modules & set(_relative_imports(file, here))
    while leaves := {name for name, others in wanted.items() if not others & wanted.keys()}:
        wanted = {name: others for name, others in wanted.items() if name not in leaves}
    assert not wanted, f"these wait for each other: {sorted(wanted)}"


def _relative_imports(file: Path, here: tuple[str, ...]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level], *filter(None, (node.module,)))
            yield ".".join(base)
            yield from (".".join((*base, alias.name)) for alias in node.names)


def test_every_arrow_that_is_allowed_is_used() -> None:
    used = set(arrows(top_level_only=False))
    unused = {(room, there) for room, may in ROOMS.items() for there in may.split()} - used
    assert not unused


def test_rooms_are_these() -> None:
    folders = {file.parent.name for file in (ROOT / "qwen3_reranker").glob("*/__init__.py")}
    assert folders == set(ROOMS) - {"top"}


def test_torch_is_imported_in_few_files() -> None:
    for file in sources("qwen3_reranker"):
        path = file.relative_to(ROOT / "qwen3_reranker")
        used = {name.split(".")[0] for name in imports(file, top_level_only=True)}
        if {"torch", "transformers"} & used:
            assert path.parts[0] in TORCH_ROOMS or str(path) in TORCH_FILES, path


def test_client_needs_no_tokenizer() -> None:
    code = (
        "import sys; from qwen3_reranker import RemoteReranker; "
        "sys.exit(bool({'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


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


def test_unit_tests_read_no_vocabulary_of_another_package() -> None:
    files = [*(ROOT / "tests/unit").glob("*.py"), *(ROOT / "tests").glob("*_tokenizer.py")]
    files += [ROOT / f"tests/{name}.py" for name in ("fakes", "engines", "invariants", "texts")]
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        wanted = {"qwen3_tokenizer", "qwen3_tokenizer_file", "save_random_qwen3", "smollm2"}
        assert not names & wanted, f"{file.name} needs another package"

"""The built wheel, used from a folder that has its own `integrations` and `finetune`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from llama_index.core.postprocessor.types import BaseNodePostprocessor

from tests.unit.test_architecture import ROOMS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index",
         "--target", str(target), str(wheel)],
        check=True,
    )  # fmt: skip
    return target


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A user's project with folders of the same names as ours."""
    for name in ("integrations", "finetune"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'user'\n")
    (tmp_path / "finetune" / "__main__.py").write_text("print('the user's own')\n")
    return tmp_path


def run(command: list[str], *, installed: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    packages = {name.rsplit("/", 1)[0] for name in names}
    assert packages == {
        "qwen3_reranker",
        *(f"qwen3_reranker/{room}" for room in set(ROOMS) - {"top"}),
        "qwen3_reranker/checkpoint/embedded_adapter",
        "finetune",
        "langchain_qwen3_reranker",
        "llama_index/postprocessor/qwen3_reranker",
    }
    assert {Path(name).suffix for name in names} == {
        ".css", ".jinja", ".json", ".py", ".safetensors", ".typed"
    }  # fmt: skip


def test_imports_work_beside_the_users_own_integrations(installed: Path, foreign: Path) -> None:
    code = (
        "import integrations, qwen3_reranker, langchain_qwen3_reranker\n"
        "from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker\n"
        "assert integrations.OWNER == 'user'\n"
        "for module in (qwen3_reranker, langchain_qwen3_reranker):\n"
        f"    assert module.__file__.startswith({str(installed)!r}), module.__file__\n"
        "assert Qwen3Reranker(model='some/model').model == 'some/model'\n"
        "assert langchain_qwen3_reranker.Qwen3Reranker(model='some/model').top_n == 3\n"
    )
    done = run([sys.executable, "-c", code], installed=installed, cwd=foreign)
    assert done.returncode == 0, done.stderr


def test_console_script_works_beside_the_users_own_finetune(installed: Path, foreign: Path) -> None:
    data = foreign / "train.jsonl"
    data.write_text('{"query": "q", "positive": ["a"], "negative": ["b", "c"]}\n')
    script = str(installed / "bin" / "qwen3-finetune")
    done = run([script, "validate", str(data)], installed=installed, cwd=foreign)
    assert done.returncode == 0, done.stderr
    assert "1 rows of 1 lines are good" in done.stdout


def test_module_form_is_shadowed_by_the_users_own_finetune(installed: Path, foreign: Path) -> None:
    # Python's rule, not ours: docs/finetuning/README.md names it. Elsewhere the module form works.
    done = run([sys.executable, "-m", "finetune"], installed=installed, cwd=foreign)
    assert "usage: qwen3-finetune" not in done.stderr
    done = run([sys.executable, "-m", "finetune"], installed=installed, cwd=foreign.parent)
    assert "usage: qwen3-finetune" in done.stderr


def test_command_line_prints_help(installed: Path, foreign: Path) -> None:
    script = str(installed / "bin" / "qwen3-reranker")
    done = run([script, "rank", "--help"], installed=installed, cwd=foreign)
    assert done.returncode == 0
    assert "--candidates" in done.stdout


def test_metadata_admits_what_is_tested_and_keeps_heavy_clients_out(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = archive.read(name).decode()
    requires = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert "Requires-Dist: torch>=2.10" in requires
    assert "Requires-Python: >=3.11" in metadata
    assert not [line for line in requires if "torchvision" in line or "torchaudio" in line]
    for heavy in ("litellm", "mkdocs-material", "vllm"):
        assert not [line for line in requires if heavy in line and "extra == 'all'" in line]


def test_llamahub_metadata_names_what_exists() -> None:
    hub = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["llamahub"]
    module = importlib.import_module(hub["import_path"])
    for name in hub["class_authors"]:
        assert issubclass(getattr(module, name), BaseNodePostprocessor)

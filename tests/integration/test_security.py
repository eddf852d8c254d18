"""Checkpoints and adapters that mean harm: refused or read as data, never run, never left.

An audit hook watches what the interpreter does meanwhile: nothing is unpickled, no code of a folder
is compiled or imported, and no file outside of the folder is opened.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qwen3_reranker import ModelLoadError
from qwen3_reranker.checkpoint.adapters import ADAPTER_RECORD
from qwen3_reranker.model.loading import load_model
from qwen3_reranker.text.prompt import TEMPLATES

Evil = Callable[[Path, Path], None]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CODE = "RAN = True\n\nclass Model: pass\n"


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class Watch:
    """Events of the interpreter that no checkpoint may cause."""

    def __init__(self) -> None:
        self.folders: tuple[Path, ...] = ()
        self.events: list[str] = []
        sys.addaudithook(self._see)  # for good: hooks cannot be removed

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folders:
            return
        if event == "pickle.find_class":
            self.events.append(f"unpickled {arguments[0]}.{arguments[1]}")
        elif event == "import" and str(arguments[0]).rpartition(".")[2].endswith("_evil"):
            self.events.append(f"imported {arguments[0]}")
        elif event in ("open", "compile", "exec"):
            name = arguments[1] if event == "compile" else arguments[0]
            name = getattr(name, "co_filename", name)
            if isinstance(name, (str, bytes)) and self._is_forbidden(Path(os.fsdecode(name))):
                self.events.append(f"{event} {Path(os.fsdecode(name)).name}")

    def _is_forbidden(self, file: Path) -> bool:
        inside, *outside = self.folders
        file = Path(os.path.normpath(file))
        is_code = file.suffix in (".bin", ".pt", ".pkl", ".py")
        return any(map(file.is_relative_to, outside)) or (is_code and file.is_relative_to(inside))

    @contextmanager
    def of(self, inside: Path, *outside: Path) -> Iterator[list[str]]:
        """Watch a folder whose code, and others no file of which, may be opened."""
        self.events, self.folders = [], (inside, *outside)
        try:
            yield self.events
        finally:
            self.folders = ()


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a good checkpoint, to be made evil."""
    return Path(shutil.copytree(checkpoint(**SMALL), tmp_path / "inside" / "model"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside"


@pytest.fixture
def mark(outside: Path) -> Path:
    return outside / "mark"


def change(file: Path, **settings: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **settings}))


def weight_map(folder: Path, target: str) -> None:
    """Make the index name one file for every tensor."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as weights:
        content = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), target)}
    (folder / INDEX).write_text(json.dumps(content))


def move_out(file: Path, outside: Path) -> None:
    shutil.move(file, outside / file.name)
    file.symlink_to(outside / file.name)


def pickle_only(folder: Path, outside: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"payload": Payload(outside / "mark")}, folder / "pytorch_model.bin")


def pickle_named_safetensors(folder: Path, outside: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Payload(outside / "mark")))


def index_names_a_pickle(folder: Path, outside: Path) -> None:
    weight_map(folder, "pytorch_model.bin")
    pickle_only(folder, outside)


def index_points_outside(folder: Path, outside: Path) -> None:
    weight_map(folder, f"../../outside/{WEIGHTS}")
    shutil.move(folder / WEIGHTS, outside / WEIGHTS)


def index_points_to_an_absolute_path(folder: Path, outside: Path) -> None:
    weight_map(folder, str(outside / WEIGHTS))
    shutil.move(folder / WEIGHTS, outside / WEIGHTS)


def index_names_no_strings(folder: Path, outside: Path) -> None:
    weight_map(folder, ["a", "list"])  # type: ignore[arg-type]
    shutil.move(folder / WEIGHTS, outside / WEIGHTS)


def weights_link_outside(folder: Path, outside: Path) -> None:
    move_out(folder / WEIGHTS, outside)


def config_links_outside(folder: Path, outside: Path) -> None:
    move_out(folder / "config.json", outside)


def tokenizer_links_outside(folder: Path, outside: Path) -> None:
    move_out(folder / "tokenizer.json", outside)


def tokenizer_links_to_itself(folder: Path, outside: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "tokenizer.json")


def folder_looks_like_a_snapshot(folder: Path, outside: Path) -> None:
    # The blobs that count are those of the repository, not any folder of that name.
    (outside / "blobs").mkdir()
    move_out(folder / WEIGHTS, outside / "blobs")


def oversize_header(folder: Path, outside: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + data[8:])


def garbled_header(folder: Path, outside: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:200] = b"\xff" * 192
    (folder / WEIGHTS).write_bytes(data)


def header_beyond_the_file(folder: Path, outside: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [0, 2**40]
    (folder / WEIGHTS).write_bytes(
        len(raw := json.dumps(header).encode()).to_bytes(8, "little") + raw + data[8 + size :]
    )


def code_of_its_own(folder: Path, outside: Path) -> None:
    (folder / "modeling_evil.py").write_text(_CODE)
    classes = {"AutoConfig": "modeling_evil.Model", "AutoModelForCausalLM": "modeling_evil.Model"}
    change(folder / "config.json", auto_map=classes)


def config_names_a_pickle(folder: Path, outside: Path) -> None:
    pickle_only(folder, outside)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    change(folder / "config.json", transformers_weights="adapter_model.bin")


def config_names_weights_outside(folder: Path, outside: Path) -> None:
    (folder / "sub").symlink_to(outside)
    shutil.move(folder / WEIGHTS, outside / WEIGHTS)
    change(folder / "config.json", transformers_weights=f"sub/{WEIGHTS}")


def adapter_within_a_model(folder: Path, outside: Path) -> None:
    change(
        folder / "adapter_config.json",
        peft_type="LORA", task_type="CAUSAL_LM", target_modules=["q_proj"],
        base_model_name_or_path=str(outside),
    )  # fmt: skip
    torch.save({"payload": Payload(outside / "mark")}, folder / "adapter_model.bin")


def endless_json(folder: Path, outside: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def endless_index(folder: Path, outside: Path) -> None:
    (folder / INDEX).write_text('{"weight_map":' * 100_000)


def slow(evil: Evil) -> Any:
    """Mark what is refused only when the weights are read."""
    return pytest.param(evil, marks=pytest.mark.slow)


EVIL_MODELS = [
    slow(pickle_only), slow(pickle_named_safetensors), index_names_a_pickle, index_points_outside,
    index_points_to_an_absolute_path, index_names_no_strings, weights_link_outside,
    config_links_outside, tokenizer_links_outside, tokenizer_links_to_itself,
    folder_looks_like_a_snapshot, slow(oversize_header), slow(garbled_header),
    slow(header_beyond_the_file), code_of_its_own, config_names_a_pickle,
    config_names_weights_outside, adapter_within_a_model, endless_json, endless_index,
]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL_MODELS, ids=lambda evil: evil.__name__)
def test_evil_model_is_refused_and_nothing_of_it_is_run(
    folder: Path, outside: Path, mark: Path, watch: Watch, evil: Evil
) -> None:
    evil(folder, outside)
    with watch.of(folder, outside) as events, pytest.raises(ModelLoadError):
        load_model(str(folder))
    print(f"{evil.__name__}: refused, {len(events)} events")
    assert events == []
    assert not mark.exists()


@pytest.fixture
def adapter(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a good adapter of the good checkpoint, to be made evil."""
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(**SMALL), dtype=torch.float32
    )
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = tmp_path / "inside" / "adapter"
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def pickled_adapter(folder: Path, outside: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"payload": Payload(outside / "mark")}, folder / "adapter_model.bin")


def adapter_of_another_base(folder: Path, outside: Path) -> None:
    template = TEMPLATES["qwen3-reranker"]
    change(
        folder / ADAPTER_RECORD,
        template={"id": template.id, "hash": template.hash},
        base={"name": "other", "fingerprint": "0" * 64},
    )


def adapter_links_outside(folder: Path, outside: Path) -> None:
    move_out(folder / "adapter_model.safetensors", outside)


def adapter_imports_a_module(folder: Path, outside: Path) -> None:
    (folder / "module_evil.py").write_text(_CODE)
    change(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="module_evil")


def adapter_of_an_unknown_kind(folder: Path, outside: Path) -> None:
    change(folder / "adapter_config.json", peft_type="module_evil.Model")


def garbled_adapter(folder: Path, outside: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 1000)


EVIL_ADAPTERS = [
    slow(pickled_adapter), slow(adapter_of_another_base), adapter_links_outside,
    slow(adapter_imports_a_module), slow(adapter_of_an_unknown_kind), slow(garbled_adapter),
]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL_ADAPTERS, ids=lambda evil: evil.__name__)
def test_evil_adapter_is_refused_and_nothing_of_it_is_run(
    checkpoint: Callable[..., Path], adapter: Path, outside: Path, mark: Path, watch: Watch,
    evil: Evil,
) -> None:  # fmt: skip
    evil(adapter, outside)
    with watch.of(adapter, outside) as events, pytest.raises(ModelLoadError):
        load_model(str(checkpoint(**SMALL)), adapter=str(adapter))
    print(f"{evil.__name__}: refused, {len(events)} events")
    assert events == []
    assert not mark.exists()


def test_good_checkpoint_and_adapter_load_without_an_event(
    folder: Path, adapter: Path, outside: Path, watch: Watch
) -> None:
    # What lies about without being asked for is left where it is.
    for name in ("training_args.bin", "optimizer.pt"):
        torch.save({"payload": Payload(outside / "mark")}, folder / name)
    (folder / "tokenization_evil.py").write_text(_CODE)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Model",
        auto_map={"AutoTokenizer": ["tokenization_evil.Model", None]},
    )
    change(folder / "config.json", _attn_implementation_internal="org/module_evil")
    change(adapter / "adapter_config.json", auto_mapping={"parent_library": "module_evil"})
    with watch.of(folder, outside) as events:
        load_model(str(folder), adapter=str(adapter))
    assert events == []


@pytest.mark.slow
def test_snapshot_of_the_hubs_cache_may_link_to_its_own_blobs(
    checkpoint: Callable[..., Path], tmp_path: Path, outside: Path
) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    shutil.copytree(checkpoint(**SMALL), snapshot)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    load_model(str(snapshot))
    (tmp_path / "alias").symlink_to(snapshot)
    load_model(str(tmp_path / "alias"))
    shutil.copy(snapshot / "config.json", outside)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(outside / "config.json")
    with pytest.raises(ModelLoadError, match=r"config\.json' is a link out of its folder"):
        load_model(str(snapshot))


def test_control_the_watch_sees_what_it_is_for(
    folder: Path, outside: Path, mark: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_links_outside(folder, outside)
    with watch.of(folder, outside) as events:
        (folder / "config.json").resolve().read_text()
    assert events == ["open config.json"]

    torch.save({"payload": Payload(mark)}, folder / "pytorch_model.bin")
    with watch.of(folder, outside) as events:
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()
    assert "open pytorch_model.bin" in events
    assert any(event.startswith("unpickled posix.mkdir") for event in events)

    modules = outside / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    code_of_its_own(folder, outside)
    with watch.of(folder, outside) as events, pytest.raises(Exception, match=r".*"):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert any(
        event.startswith(("imported", "exec", "compile", "open modeling")) for event in events
    )

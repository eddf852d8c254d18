"""Files beside a checkpoint that lead elsewhere, and adapters that would run something."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qwen3_reranker import ModelLoadError, Reranker
from qwen3_reranker.checkpoint.adapters import (
    _match_soon,
    _refuse_adapter,
    recorded_base,
    recorded_template,
    refuse_other_base,
)
from qwen3_reranker.checkpoint.embedded import find_gguf
from qwen3_reranker.checkpoint.locate import open_checkpoint
from qwen3_reranker.model.loading import load_model
from tests.attacks.limits import bounded

pytestmark = pytest.mark.attack


class Base:
    """Has what the check of an adapter reads of its base."""

    lm_head = None

    class config:  # noqa: N801
        tie_word_embeddings = False


def adapter(folder: Path, **settings: Any) -> Path:
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "payload"},
        {"layer_replication": [[0, 1000]]}, {"loftq_config": {"x": 1}}, {"eva_config": {"x": 1}},
        {"corda_config": {"x": 1}}, {"arrow_config": {"x": 1}}, {"peft_type": "PROMPT_TUNING"},
        {"target_modules": "(a+)+$"}, {"target_modules": "(q|q_proj)*x"},
        {"exclude_modules": "([a-z]+)*$"}, {"rank_pattern": {"(x+x+)+y": 8}},
        {"alpha_pattern": {"(.*a){30}": 8}}, {"layers_pattern": "(a*)*b"},
        {"target_modules": 7}, {"target_modules": [["q_proj"]]}, {"target_modules": [{}]},
        {"rank_pattern": 5}, {"rank_pattern": ["(x+x+)+y"]}, {"alpha_pattern": "(a+)+$"},
        {"layers_pattern": 3}, {"modules_to_save": "lm_head"}, {"exclude_modules": {"(a+)+$": 1}},
        {"peft_type": ["LORA"]}, {"task_type": 10**400}, {"task_type": {}},
        {"target_modules": r"(.|\w)" * 40 + "!"}, {"exclude_modules": "(|)" * 1_000_000},
        {"target_modules": "(" * 40 + ".|.)" * 40}, {"target_modules": "((a|b)|(a|b))" * 30},
        {"rank_pattern": {f"{i}(a|b)(a|b)(a|b)": 8 for i in range(2000)}},
    ],
)  # fmt: skip
def test_adapter_that_asks_for_more_than_its_weights_is_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(ModelLoadError, match="does not fit the base model"):
        _refuse_adapter(Base(), adapter(tmp_path, **settings))


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": "all-linear"}, {"target_modules": r".*\.(q_proj|v_proj)$"},
     {"rank_pattern": {"layers.0.q_proj": 8}, "loftq_config": {}},
     {"target_modules": f"layers.({'|'.join(map(str, range(64)))}).(self_attn|mlp).(q|v)_proj"},
     {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(5000)]},
     {"target_modules": "("}, {"megatron_core": "megatron.core"}],
)  # fmt: skip
def test_control_usual_adapters_pass(tmp_path: Path, settings: dict[str, Any]) -> None:
    _refuse_adapter(Base(), adapter(tmp_path, **settings))


@pytest.fixture
def base(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(hidden_size=16, intermediate_size=16, num_hidden_layers=2)


def causal(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that importing `adapter_payload` would leave behind."""
    written = tmp_path / "mark"
    (tmp_path / "adapter_payload.py").write_text(f"open({str(written)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "adapter_payload", raising=False)
    return written


@pytest.fixture
def importing(base: Path, tmp_path: Path) -> Path:
    """Return an adapter that fits the base, and names a module for peft to import."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(causal(base), config).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    return adapter(
        folder, **settings | {"megatron_config": {"a": 1}, "megatron_core": "adapter_payload"}
    )


def test_module_that_an_adapter_names_is_not_imported(
    base: Path, importing: Path, mark: Path
) -> None:
    with pytest.raises(ModelLoadError, match="sets megatron_config"):
        load_model(str(base), adapter=str(importing))
    assert not mark.exists()


def test_module_that_an_adapter_names_is_not_imported_by_peft_alone(
    base: Path, importing: Path, mark: Path
) -> None:
    """What raised its floor: peft 0.19 imports the module."""
    from peft import PeftModel

    with pytest.raises(ValueError, match="megatron_core"):
        PeftModel.from_pretrained(causal(base), importing)
    assert not mark.exists()


def test_control_module_can_be_imported(mark: Path) -> None:
    importlib.import_module("adapter_payload")
    assert mark.exists()


def test_patterns_that_pass_match_in_a_moment(tried: Callable[[int], None]) -> None:
    import itertools
    import re

    parts, count = ["a", "(a|a)", ".", "\\w", "a|", "^", "$", "(.|.)" * 12, "(|)" * 24], 0
    name = "a" * 200 + "!"  # longer than any
    for combination in itertools.product(parts, repeat=4):
        pattern = ".*" + "".join(combination)
        if not _match_soon([pattern]):
            continue
        count += 1
        started = time.monotonic()
        re.fullmatch(pattern, name)
        assert time.monotonic() - started < 1, pattern
    assert count > 1000
    tried(count)


@pytest.mark.slow
def test_files_beside_a_gguf_file_lead_nowhere(tmp_path: Path) -> None:
    """Scores 0.80 became 0.36 by an adapter that nobody had named."""
    file = tmp_path / "model.gguf"
    shutil.copy(find_gguf(), file)
    documents = ["Paris is the capital of France.", "Tea is a drink."]
    alone = Reranker(str(file)).score("capital of France", documents)
    missing = {"base_model_name_or_path": str(tmp_path / "none"), "peft_type": "LORA"}
    for name in ("adapter_config.json", "config.json", "generation_config.json",
                 "tokenizer_config.json", "special_tokens_map.json"):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(missing | {"auto_map": {"AutoConfig": "x.y"}}))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}')
    assert Reranker(str(file)).score("capital of France", documents) == alone


@pytest.mark.parametrize(
    "record",
    [
        {"template": {"id": [], "hash": "x"}}, {"template": {"id": "chatml", "hash": 7}},
        {"template": {"id": {}, "hash": {}}}, {"template": "chatml"}, {"template": []}, {},
    ],
)  # fmt: skip
def test_record_of_a_template_that_is_none_is_refused(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    (tmp_path / "qwen3_reranker.json").write_text(json.dumps(record))
    with pytest.raises(ModelLoadError, match="has no template id and hash"):
        recorded_template(None, tmp_path)


@pytest.mark.parametrize("base", [[], ["x"], "base", 7])
def test_record_of_a_base_that_is_none_is_refused(tmp_path: Path, base: Any) -> None:
    (tmp_path / "qwen3_reranker.json").write_text(json.dumps({"base": base}))
    for read in (recorded_base, lambda folder: refuse_other_base("x", folder)):
        with pytest.raises(ModelLoadError, match="must describe the base in an object"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels"])
def test_configuration_of_endless_lists_is_refused_before_they_are_made(
    tmp_path: Path, name: str
) -> None:
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], name: 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = f"{name} in .* must be a whole number of at most 1000, got 1000000000"
    with bounded(seconds=2, megabytes=50), pytest.raises(ModelLoadError, match=message):
        open_checkpoint(str(tmp_path), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": [["Qwen3ForCausalLM"]]}, {"architectures": "Qwen3ForCausalLM"},
        {"architectures": [7]}, {"architectures": {"a": 1}}, {"layer_types": [["a"]]},
        {"layer_types": [1, "b"]}, {"rope_parameters": {"rope_type": ["default"]}},
        {"model_type": ["qwen3"]}, {"model_type": {}}, {"num_labels": "1"},
    ],
)  # fmt: skip
def test_configuration_of_other_types_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    usual = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(usual | changes))
    with pytest.raises(ModelLoadError):
        open_checkpoint(str(tmp_path), None)


@pytest.mark.parametrize("content", [b"[" * 100_000, b" " * 70_000_000, b"\xff", b"[]"])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with bounded(seconds=5, megabytes=300), pytest.raises(ModelLoadError, match="adapter_config"):
        recorded_base(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "null\0character"])
def test_model_of_a_name_that_no_file_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match="not a Hub name"):
        open_checkpoint(name, None)

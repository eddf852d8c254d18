"""Files beside a checkpoint that lead elsewhere, and adapters that would run something."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_reranker import ModelLoadError, Reranker
from qwen3_reranker.adapters import (
    _PLAIN_PATTERN,
    _refuse_adapter,
    recorded_base,
    recorded_template,
    refuse_other_base,
)
from qwen3_reranker.checkpoint import open_checkpoint
from qwen3_reranker.embedded import find_gguf
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
     {"megatron_core": "megatron.core"}],
)  # fmt: skip
def test_control_usual_adapters_pass(tmp_path: Path, settings: dict[str, Any]) -> None:
    _refuse_adapter(Base(), adapter(tmp_path, **settings))


def test_patterns_that_pass_match_in_a_moment(tried: Callable[[int], None]) -> None:
    import itertools
    import re

    parts, count = ["a", "(a|a)", ".", "\\w", "a|", "^", "$"], 0
    name = "a" * 5000 + "!"
    for combination in itertools.product(parts, repeat=4):
        pattern = ".*" + "".join(combination)
        if not _PLAIN_PATTERN.fullmatch(pattern):
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

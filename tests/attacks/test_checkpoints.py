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
from qwen3_reranker.adapters import _PLAIN_PATTERN, _refuse_adapter
from qwen3_reranker.embedded import find_gguf

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

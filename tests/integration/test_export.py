"""`qwen3-finetune export`: other programs score what is exported as we score its source."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch

from finetune import export
from finetune.cli import main
from finetune.whole import SAMPLE
from qwen3_reranker import Reranker
from qwen3_reranker.prompt import TEMPLATES

FORMATS = ["seq-cls", "sentence-transformers"]


def log_odds(model: Path | str, **settings: Any) -> np.ndarray[Any, Any]:
    with Reranker(str(model), device="cpu", **settings) as reranker:
        rows = [reranker.rank(query, documents) for query, documents in SAMPLE]
    return np.array([r.log_odds for row in rows for r in sorted(row, key=lambda r: r.index)])


def run(model: Path, form: str, output: Path, more: str = "") -> int:
    command = f"export --model {model} --format {form} --output_dir {output} {more}"
    return main(shlex.split(command))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_scores_as_its_source(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    form: str, tied: bool,
) -> None:  # fmt: skip
    source, output = checkpoint(tied=tied), tmp_path / "export"
    assert run(source, form, output) == 0
    printed = capsys.readouterr().out
    assert "bound 0.0001" in printed
    assert f'from_pretrained("{output}")' in printed or f'CrossEncoder("{output}")' in printed
    # The core reads both formats, too.
    expected = log_odds(source, dtype="float32")
    np.testing.assert_allclose(log_odds(output, dtype="float32"), expected, atol=1e-4)
    config = json.loads((output / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # older transformers
    kind = "ForSequenceClassification" if form == "seq-cls" else "ForCausalLM"
    assert config["architectures"][0].endswith(kind)


def test_adapter_is_exported_with_its_base(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    tuned = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    tuned.save_pretrained(adapter := tmp_path / "adapter")
    assert run(checkpoint(), "seq-cls", tmp_path / "export", f"--adapter {adapter}") == 0
    found = log_odds(tmp_path / "export", dtype="float32")
    expected = log_odds(checkpoint(), adapter=str(adapter), dtype="float32")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - log_odds(checkpoint(), dtype="float32")).max() > 1e-2


@pytest.mark.slow  # as above, with other weights
@pytest.mark.parametrize("form", FORMATS)
def test_half_precision_has_a_bound_of_its_own(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    assert run(checkpoint(dtype="bfloat16"), form, tmp_path / "export") == 0
    assert "bound 0.3" in capsys.readouterr().out
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow  # a real pretrained checkpoint
@pytest.mark.parametrize("form", FORMATS)
def test_real_weights_score_alike(smollm2: Path, tmp_path: Path, form: str) -> None:
    assert run(smollm2, form, tmp_path / "export") == 0


@pytest.mark.parametrize("form", FORMATS)
def test_export_that_scores_otherwise_is_not_kept(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], form: str,
) -> None:  # fmt: skip
    write, check, step = export._FORMATS[form]

    def broken(whole: Any, folder: Path) -> None:
        torch.nn.init.zeros_(whole.full.base_model.layers[0].self_attn.q_proj.weight)
        write(whole, folder)

    monkeypatch.setitem(export._FORMATS, form, (broken, check, step))
    assert run(checkpoint(), form, tmp_path / "export") == 2
    assert "away from its source" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = checkpoint(architecture="ForSequenceClassification")
    assert run(classifier, "sentence-transformers", tmp_path / "export") == 2
    assert "is a sequence classifier already" in capsys.readouterr().err
    assert run(classifier, "seq-cls", tmp_path / "export") == 0
    assert run(classifier, "seq-cls", tmp_path / "export") == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_renders_the_prompt_byte_for_byte(name: str) -> None:
    template = TEMPLATES[name]
    jinja = jinja2.Environment(autoescape=False)  # noqa: S701
    rendered = jinja.from_string(export.chat_template(template))
    texts = {"query": 'a "b" \\ {{ c }}\n', "document": "<d> & é 中文 "}
    messages = [{"role": role, "content": text} for role, text in texts.items()]
    for instruction in (None, 'Find "it"'):
        system = [] if instruction is None else [{"role": "system", "content": instruction}]
        found = rendered.render(messages=[*system, *messages])
        expected = template.render(instruction or template.default_instruction, **texts)
        assert found == expected

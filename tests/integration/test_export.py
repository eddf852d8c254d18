"""`qwen3-finetune export`: other programs score what is exported as we score its source."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
import torch

from finetune import export, gguf_export, publish, whole
from finetune.cli import main
from finetune.whole import SAMPLE, load_whole
from qwen3_reranker import Reranker
from qwen3_reranker.call.results import in_order
from qwen3_reranker.errors import InputError, Qwen3RerankerError
from qwen3_reranker.text.prompt import PUBLISHED_EVAL, TEMPLATES

FORMATS = ["seq-cls", "sentence-transformers"]
GGUF = pytest.param("gguf", marks=pytest.mark.slow)  # gguf reads 300,000 tokens and merges: 8 s


def log_odds(model: Path | str, **settings: Any) -> np.ndarray[Any, Any]:
    with Reranker(str(model), device="cpu", **settings) as reranker:
        rows = [reranker.rank(query, documents) for query, documents in SAMPLE]
    return np.concatenate([in_order(row) for row in rows])


def run(model: Path, form: str, output: Path, more: str = "") -> int:
    command = f"export --model {model} --format {form} --output_dir {output} {more}"
    return main(shlex.split(command))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the Hub by a list of what it was asked."""
    calls: list[Any] = []

    def create_repo(name: str, **settings: Any) -> SimpleNamespace:
        calls.append((name, settings))
        if name == "nobody/refused":
            raise OSError("no connection")
        return SimpleNamespace(repo_id=name)

    def upload_folder(**settings: Any) -> None:
        calls.append((settings, sorted(p.name for p in settings["folder_path"].iterdir())))

    api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr(publish, "HfApi", lambda: api)
    monkeypatch.setattr(publish, "get_token", lambda: "token")
    return calls


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
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
    if form == "sentence-transformers":  # what vLLM makes a classifier by
        assert config["classifier_from_token"] == ["no", "yes"]
        assert config["method"] == "from_2_way_softmax"


@pytest.mark.slow  # as above; more rows in the embedding than tokens, as in the real checkpoints
@pytest.mark.parametrize(
    "settings",
    [
        {"tied": True}, {"tied": False, "vocab_size": 151936}, {"dtype": "bfloat16"},
        {"architecture": "ForSequenceClassification"},
    ],
)  # fmt: skip
def test_gguf_file_scores_as_its_source(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
) -> None:  # fmt: skip
    assert run(checkpoint(**settings), "gguf", tmp_path / "export") == 0
    assert f"llama-server --rerank --model {tmp_path}" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == ["README.md", "model.gguf"]


@pytest.fixture
def adapter(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
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
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapter_is_exported_with_its_base(
    checkpoint: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("form", [*FORMATS, GGUF])
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


@pytest.mark.parametrize("form", ["seq-cls", GGUF])
def test_wrong_head_is_neither_kept_nor_uploaded(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], hub: list[Any], form: str,
) -> None:  # fmt: skip
    right = export.yes_no_row
    for module in (export, gguf_export):
        monkeypatch.setattr(module, "yes_no_row", lambda *source: -right(*source))
    assert run(checkpoint(), form, tmp_path / "export", "--push_to_hub someone/reranker") == 2
    assert "away from its source" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert hub == []


def test_adapter_without_its_scale_is_not_kept(
    checkpoint: Callable[..., Path], adapter: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    right = whole.merge_adapter

    def unscaled(full: Any, folder: Path) -> Any:
        shutil.copytree(folder, other := tmp_path / "unscaled")
        settings = json.loads((other / "adapter_config.json").read_text())
        assert settings["lora_alpha"] != settings["r"]
        settings["lora_alpha"] = settings["r"]
        (other / "adapter_config.json").write_text(json.dumps(settings))
        return right(full, other)

    monkeypatch.setattr(whole, "merge_adapter", unscaled)
    assert run(checkpoint(), "seq-cls", tmp_path / "export", f"--adapter {adapter}") == 2
    assert "away from its source" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_what_cannot_be_exported_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = checkpoint(architecture="ForSequenceClassification")
    assert run(classifier, "sentence-transformers", tmp_path / "export") == 2
    assert "is a sequence classifier already" in capsys.readouterr().err
    assert run(classifier, "seq-cls", tmp_path / "export") == 0
    assert run(classifier, "seq-cls", tmp_path / "export") == 2
    assert "exists already" in capsys.readouterr().err


def test_what_llama_cpp_cannot_rerank_with_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its files of these have no place for a head: they do not load, or score by a hidden state.
    assert run(checkpoint(family="Llama"), "gguf", tmp_path / "export") == 2
    assert "Qwen3 decoders alone, this one is llama" in capsys.readouterr().err
    scaled = load_whole(str(checkpoint()), None)
    scaled.full.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    with pytest.raises(InputError, match="its rotary embedding is 'linear'"):
        gguf_export.write_gguf(scaled, tmp_path)
    words = load_whole(str(checkpoint()), None)
    other = words.tokenizer_json.replace(r"\\p{N}|", r"\\p{N}{1,3}|")
    assert other != words.tokenizer_json
    with pytest.raises(InputError, match="cuts words otherwise"):
        gguf_export.write_gguf(replace(words, tokenizer_json=other), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["sentence-transformers", GGUF])
def test_instruction_is_in_the_prompt_that_is_written(
    checkpoint: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    instruction = 'Find "tea" 🍵'
    more = f"--instruction {shlex.quote(instruction)}"
    assert run(checkpoint(), form, tmp_path / "export", more) == 0
    assert instruction in (tmp_path / "export" / "README.md").read_text()


def test_merged_model_has_the_card_that_llama_cpps_converter_reads(
    checkpoint: Callable[..., Path], adapter: Path, tmp_path: Path, hub: list[Any]
) -> None:
    command = f"merge --model {checkpoint()} --adapter {adapter} --output_dir {tmp_path}/merged"
    assert main(shlex.split(f"{command} --push_to_hub someone/merged")) == 0
    assert hub[1][0]["folder_path"] == tmp_path / "merged"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# qwen3-reranker" in card.lower()  # what `_is_qwen3_reranker` looks for
    assert str(tmp_path) not in card
    assert "base_model" not in card
    publish.write_card(tmp_path, "Qwen/Qwen3-Reranker-0.6B", PUBLISHED_EVAL, "Find", "load it")
    card = (tmp_path / "README.md").read_text()
    assert "# qwen3-reranker" not in card.lower()  # the converter's prompt would be another
    assert "base_model: Qwen/Qwen3-Reranker-0.6B\n" in card


def test_checked_export_is_uploaded_privately(
    checkpoint: Callable[..., Path], tmp_path: Path, hub: list[Any]
) -> None:
    more = "--push_to_hub someone/reranker"
    assert run(checkpoint(), "seq-cls", tmp_path / "export", more) == 0
    (created, (settings, files)) = hub
    assert created == ("someone/reranker", {"private": True, "exist_ok": True})
    assert settings["repo_id"] == "someone/reranker"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)


def test_upload_that_fails_keeps_the_folder(tmp_path: Path, hub: list[Any]) -> None:
    with pytest.raises(Qwen3RerankerError, match=f"hf upload nobody/refused {tmp_path}"):
        publish.push_to_hub(tmp_path, "nobody/refused")
    assert tmp_path.is_dir()


def test_missing_token_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publish, "get_token", lambda: None)
    assert run(Path("nothing"), "gguf", tmp_path / "export", "--push_to_hub a/b") == 2
    assert "set HF_TOKEN" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_renders_the_prompt_byte_for_byte(name: str) -> None:
    template = TEMPLATES[name]
    jinja = jinja2.Environment(autoescape=False)  # noqa: S701
    default = 'By default, "é" 🍵 }} '
    rendered = jinja.from_string(template.as_jinja(default))
    texts = {"query": 'a "b" \\ {{ c }}\n', "document": "<d> & é 中文 "}
    messages = [{"role": role, "content": text} for role, text in texts.items()]
    asked = 'Find "it"'
    system = {"role": "system", "content": asked}
    assert rendered.render(messages=messages) == template.render(default, **texts)
    expected = template.render(asked, **texts)
    assert rendered.render(messages=[system, *messages]) == expected  # sentence-transformers
    assert rendered.render(messages=messages, instruction=asked) == expected  # vLLM

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3_reranker import InputError, ModelLoadError
from qwen3_reranker.cli import vllm_command
from qwen3_reranker.cli.main import _parser, main
from qwen3_reranker.cli.vllm_command import SCORE_TEMPLATE, vllm_settings
from qwen3_reranker.text.prompt import QWEN3_RERANKER

COMPOSE = Path(__file__).parents[2] / "recipes/vllm/compose.yaml"
CAUSAL = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960}
CLASSIFIER = {
    "architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"},
}  # fmt: skip
TEXTS = ["capital of China", 'a "b" \\ {{ c }} {% d %}', " \n<d> & é 中文 🍵\n\n", ""]


def write(folder: Path, config: dict[str, Any], *files: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in files:
        (folder / name).touch()
    return str(folder)


def options(line: str) -> dict[str, str]:
    """Return the options of a vLLM command line, each of which has a value."""
    words = shlex.split(line)
    words = words[next(i for i, word in enumerate(words) if word.startswith("--")) :]
    return dict(zip(words[::2], words[1::2], strict=True))


def render(query: str, document: str, **variables: str) -> str:
    """Render as vLLM 0.32 does, which leaves it to transformers."""
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    template = jinja.from_string(SCORE_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(messages=messages, tools=None, add_generation_prompt=False, **variables)


@pytest.mark.parametrize("query", TEXTS)
@pytest.mark.parametrize("document", TEXTS)
def test_template_renders_the_prompt_byte_for_byte(query: str, document: str) -> None:
    default = QWEN3_RERANKER.default_instruction
    assert render(query, document) == QWEN3_RERANKER.render(default, query, document)
    for instruction in TEXTS[:-1]:
        expected = QWEN3_RERANKER.render(instruction, query, document)
        assert render(query, document, instruction=instruction) == expected


def test_template_is_what_exports_carry() -> None:
    written = SCORE_TEMPLATE.read_bytes().decode()
    assert written == QWEN3_RERANKER.as_jinja()
    assert written.endswith("</think>\n\n\n")  # an editor may take them, and Jinja takes the last


def test_causal_checkpoint_is_made_a_classifier(tmp_path: Path) -> None:
    settings, template = vllm_settings(write(tmp_path, CAUSAL))
    assert settings["hf_overrides"]["is_original_qwen3_reranker"] is True
    assert (settings["runner"], settings["max_model_len"]) == ("pooling", 8192)
    assert template == SCORE_TEMPLATE


def test_classifier_is_one_already(tmp_path: Path) -> None:
    settings, template = vllm_settings(write(tmp_path, CLASSIFIER))
    assert settings == {"runner": "pooling", "max_model_len": 8192}
    assert template == SCORE_TEMPLATE


def test_exports_bring_their_prompt(tmp_path: Path) -> None:
    llama = {**CLASSIFIER, "architectures": ["LlamaForSequenceClassification"]}
    for number, config in enumerate([CLASSIFIER, llama]):
        folder = tmp_path / str(number)
        settings, template = vllm_settings(write(folder, config, "score_template.jinja"))
        assert settings.keys() == {"runner", "max_model_len"}
        assert template == folder / "score_template.jinja"
    config = {**CAUSAL, "classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
    settings, template = vllm_settings(write(tmp_path / "bundle", config, "chat_template.jinja"))
    assert settings["convert"] == "classify"
    assert "hf_overrides" not in settings
    assert template == tmp_path / "bundle/chat_template.jinja"


def test_chat_template_of_a_checkpoint_is_not_its_prompt(tmp_path: Path) -> None:
    _, template = vllm_settings(write(tmp_path, CAUSAL, "chat_template.jinja"))
    assert template == SCORE_TEMPLATE  # the other is for conversations


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "finetune export --format seq-cls --model"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "cannot be told how"),
        ({**CLASSIFIER, "id2label": {"0": "a", "1": "b"}}, "cannot be told how"),
        ({}, "its architecture is none"),
    ],
)
def test_what_vllm_cannot_score_with_is_told(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        vllm_settings(write(tmp_path, config))


def test_adapter_is_to_be_merged_first(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(InputError, match=f"qwen3-finetune merge .* --adapter {tmp_path}"):
        vllm_settings(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_folder_without_a_configuration_is_told(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        vllm_settings(str(tmp_path))


def test_hub_name_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise OSError
        return write(tmp_path, CAUSAL)

    monkeypatch.setattr(vllm_command, "snapshot_download", snapshot_download)
    line = vllm_command.vllm_command("Qwen/Qwen3-Reranker-0.6B")
    assert line.startswith("vllm serve Qwen/Qwen3-Reranker-0.6B --runner pooling ")
    assert asked == [("Qwen/Qwen3-Reranker-0.6B", ["config.json", "*.jinja"])]  # no weights
    with pytest.raises(ModelLoadError, match="could not be fetched from the Hub"):
        vllm_settings("nobody/nothing")


def test_command_is_quoted_for_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "it's a $model", CAUSAL)
    arguments = ["vllm-command", model, "--tensor-parallel-size", "2", "--port", "8123"]
    assert main(arguments) == 0
    line, note = capsys.readouterr().out.splitlines()
    assert shlex.split(line)[:3] == ["vllm", "serve", model]
    found = options(line)
    assert (found["--tensor-parallel-size"], found["--port"]) == ("2", "8123")
    assert found["--host"] == "127.0.0.1"  # vLLM's own default is every network
    assert json.loads(found["--hf-overrides"])["classifier_from_token"] == ["no", "yes"]
    assert Path(found["--chat-template"]).is_file()
    assert note.startswith('# Then, in Python: RemoteReranker("http://127.0.0.1:8123")')
    assert main([*arguments[:2], "--tensor-parallel-size", "0"]) == 2
    assert "tensor_parallel_size must be" in capsys.readouterr().err


def test_compose_recipe_starts_what_the_command_starts(tmp_path: Path) -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    printed = options(vllm_command.vllm_command(write(tmp_path, CAUSAL)))
    composed = options(services["reranker"]["command"])
    del composed["--gpu-memory-utilization"]
    for here in (printed, composed):
        assert Path(here.pop("--chat-template")).name == SCORE_TEMPLATE.name
        assert here.pop("--host") in ("127.0.0.1", "0.0.0.0")  # noqa: S104 - in a container
        here["--hf-overrides"] = json.loads(here["--hf-overrides"])
    assert composed == printed
    source, target, _ = services["reranker"]["volumes"][1].split(":")
    assert (COMPOSE.parent / source).resolve() == SCORE_TEMPLATE
    assert f"--chat-template {target} " in services["reranker"]["command"]
    for name in ("reranker", "embedding"):
        assert services[name]["entrypoint"] == ["vllm", "serve"]
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    page = _parser().parse_args(services["ui"]["command"])
    assert page.url.removeprefix("http://") == services["reranker"]["ports"][0].rpartition(":")[0]
    assert (COMPOSE.parent / services["ui"]["build"]["context"] / "Dockerfile").is_file()

"""The command that starts vLLM, and the template it is given."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import jinja2.sandbox
import pytest

from finetune.cli import main as finetune
from qwen3_reranker import InputError
from qwen3_reranker.cli import main
from qwen3_reranker.prompt import QWEN3_RERANKER
from qwen3_reranker.vllm_command import TEMPLATE, vllm_command


def parsed(command: str) -> argparse.Namespace:
    """Read a command as vLLM would."""
    words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("--runner", "--chat-template", "--convert"):
        parser.add_argument(name)
    parser.add_argument("--hf-overrides", type=json.loads)
    parser.add_argument("--tensor-parallel-size", type=int)
    parser.add_argument("--port", type=int)
    return parser.parse_args(words[2:])


def test_template_that_is_shipped_renders_the_official_prompt_byte_for_byte() -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text == QWEN3_RERANKER.as_jinja()
    # The environment in which transformers, and vLLM with it, render chat templates.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "query", "content": "q\n"}, {"role": "document", "content": " <d>\n\n"}]
    rendered = environment.from_string(text).render
    assert rendered(messages=messages) == QWEN3_RERANKER.render(
        QWEN3_RERANKER.default_instruction, "q\n", " <d>\n\n"
    )
    expected = QWEN3_RERANKER.render("Find it", "q\n", " <d>\n\n")
    assert rendered(messages=messages, instruction="Find it") == expected
    shorter = environment.from_string(text.removesuffix("\n")).render
    assert shorter(messages=messages, instruction="Find it") != expected  # as vLLM's example is


def test_published_checkpoint_is_told_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["vllm-command", "Qwen/Qwen3-Reranker-4B", "--tensor-parallel-size", "2"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    options = parsed(out)
    assert (options.model, options.runner) == ("Qwen/Qwen3-Reranker-4B", "pooling")
    assert options.hf_overrides["is_original_qwen3_reranker"] is True
    assert options.hf_overrides["classifier_from_token"] == ["no", "yes"]
    assert (options.chat_template, options.tensor_parallel_size) == (str(TEMPLATE), 2)
    assert 'RemoteReranker("http://127.0.0.1:8000")' in err


@pytest.mark.parametrize(
    ("format", "template", "convert"),
    [
        ("seq-cls", "score_template.jinja", None),
        ("sentence-transformers", "chat_template.jinja", "classify"),
    ],
)
def test_exports_say_it_themselves(
    format: str, template: str, convert: str | None,
    checkpoint: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "a folder"
    command = ["export", "--format", format, "--model", str(checkpoint())]
    assert finetune([*command, "--output_dir", str(folder)]) == 0
    options = parsed(vllm_command(str(folder), port=8001))
    assert (options.model, options.port) == (str(folder), 8001)
    assert options.chat_template == str(folder / template)
    assert (options.convert, options.hf_overrides) == (convert, None)


def test_numbers_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(InputError, match="tensor_parallel_size must be at least 1, got 0"):
        vllm_command("model", port=8000, tensor_parallel_size=0)

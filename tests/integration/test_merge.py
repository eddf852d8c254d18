"""`qwen3-finetune merge`: what is merged scores as what it was merged from."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import whole
from finetune.cli import main
from finetune.merge import coefficients
from finetune.whole import SAMPLE
from qwen3_reranker import Reranker
from qwen3_reranker.call.results import in_order
from tests.real_parts import save_random_adapter

SHAPES = [{"tied": True}, {"tied": False}]
MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(checkpoint: Callable[..., Path], tmp_path: Path) -> MakeAdapter:
    """Return a function that writes a LoRA adapter with random weights."""

    def make(name: str, base: Path | None = None, **settings: Any) -> Path:
        return save_random_adapter(tmp_path / name, base or checkpoint(), **settings)

    return make


def scores(model: Path | str, **settings: Any) -> np.ndarray[Any, Any]:
    with Reranker(str(model), dtype="float32", device="cpu", **settings) as reranker:
        rows = [reranker.rank(query, documents) for query, documents in SAMPLE]
    return np.concatenate([in_order(row) for row in rows])


def changes(adapter: Path) -> dict[str, torch.Tensor]:
    """Return what an adapter adds to each layer."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings["use_rslora"] else rank)
    state = load_file(adapter / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
    return {n: scale * state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in names}


@pytest.mark.parametrize("shape", SHAPES, ids=["tied", "untied"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param({name: True}, marks=pytest.mark.slow, id=name)
            for name in ("use_rslora", "use_dora")
        ),
    ],
)
def test_adapter_in_its_base_scores_as_beside_it(
    checkpoint: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], shape: dict[str, bool], settings: dict[str, bool],
) -> None:  # fmt: skip
    base = checkpoint(**shape)
    adapter, output = make_adapter("one", base, **settings), tmp_path / "merged"
    command = f"merge --model {base} --adapter {adapter} --output_dir {output}"
    assert main(shlex.split(command)) == 0
    both = scores(base, adapter=str(adapter))
    np.testing.assert_allclose(scores(output), both, atol=1e-5)
    assert np.abs(both - scores(base)).max() > 1e-2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"qwen3-reranker rank --model {output} ")


def test_merge_that_scores_otherwise_is_not_kept(
    checkpoint: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = whole.merge_adapter

    def forgetful(full: Any, folder: Path) -> Any:
        merged = real(full, folder)
        torch.nn.init.zeros_(merged.model.layers[0].self_attn.q_proj.weight)
        return merged

    monkeypatch.setattr(whole, "merge_adapter", forgetful)
    output = tmp_path / "merged"
    command = f"merge --model {checkpoint()} --adapter {make_adapter('one')} --output_dir {output}"
    assert main(shlex.split(command)) == 2
    assert "away from base and adapter" in capsys.readouterr().err
    assert not output.exists()
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_mean_of_adapters_adds_the_mean_of_their_changes(
    make_adapter: MakeAdapter, tmp_path: Path, weights: list[float] | None
) -> None:
    one, other = make_adapter("one"), make_adapter("two", r=2, lora_alpha=16, use_rslora=True)
    output = tmp_path / "mean"
    command = f"merge --adapter {one} {other} --output_dir {output}"
    if weights is not None:
        command += f" --weights {weights[0]} {weights[1]}"
    assert main(shlex.split(command)) == 0
    first, second, merged = changes(one), changes(other), changes(output)
    share = 0.5 if weights is None else 0.75
    assert set(merged) == set(first)
    for name, change in merged.items():
        expected = (1 - share) * first[name] + share * second[name]
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", ["1 0", "0 1"])
def test_ends_of_the_arc_are_the_adapters(
    checkpoint: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path, weights: str
) -> None:
    pair = make_adapter("one"), make_adapter("two")
    output = tmp_path / "end"
    command = f"merge --adapter {pair[0]} {pair[1]} --method slerp --weights {weights}"
    assert main(shlex.split(f"{command} --output_dir {output}")) == 0
    end = str(pair[weights == "0 1"])
    expected = scores(checkpoint(), adapter=end)
    found = scores(checkpoint(), adapter=str(output))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("degrees", [60, 120])
def test_midpoint_of_two_changes_keeps_their_length(
    make_adapter: MakeAdapter, tmp_path: Path, degrees: int
) -> None:
    one = make_adapter("one", r=1, lora_alpha=1)
    other = tmp_path / "turned"
    other.mkdir()
    state = load_file(one / "adapter_model.safetensors")
    for name in changes(one):  # of equal length: B is turned by the angle, against A of rank 1
        b = state[f"{name}.lora_B.weight"]
        across = torch.randn(b.shape)
        across -= (across * b).sum() / (b * b).sum() * b
        across *= b.norm() / across.norm()
        angle = math.radians(degrees)
        state[f"{name}.lora_B.weight"] = math.cos(angle) * b + math.sin(angle) * across
    save_file(state, other / "adapter_model.safetensors", metadata={"format": "pt"})
    (other / "adapter_config.json").write_text((one / "adapter_config.json").read_text())
    output = tmp_path / "middle"
    assert (
        main(shlex.split(f"merge --adapter {one} {other} --method slerp --output_dir {output}"))
        == 0
    )
    before, middle = changes(one), changes(output)
    for name, change in middle.items():
        assert float(change.norm()) == pytest.approx(float(before[name].norm()), rel=1e-5)
    cosine = math.cos(math.radians(degrees))
    mean = coefficients("linear", None, 2)(lambda: cosine)
    assert mean[0] < coefficients("slerp", None, 2)(lambda: cosine)[0]


def test_parallel_and_opposite_tensors_are_averaged() -> None:
    for cosine in (1.0, -1.0, math.nan):
        assert coefficients("slerp", [1, 3], 2)(lambda value=cosine: value) == [0.25, 0.75]


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_models_are_merged_tensor_by_tensor(
    checkpoint: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    pair = [checkpoint(), checkpoint(seed=1)]
    output = tmp_path / "merged"
    command = f"merge --model {pair[0]} {pair[1]} --method {method} --output_dir {output}"
    assert main(shlex.split(command)) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in pair)
    merged = load_file(output / "model.safetensors")
    assert set(merged) == set(first)
    for name, tensor in merged.items():
        one, other = first[name].double(), second[name].double()
        factor = 0.5
        if method == "slerp":
            cosine = float((one * other).sum() / (one.norm() * other.norm()))
            if abs(cosine) < 0.9995:
                angle = math.acos(cosine)
                factor = math.sin(angle / 2) / math.sin(angle)
        torch.testing.assert_close(tensor.double(), factor * (one + other), rtol=1e-5, atol=1e-6)
    assert np.isfinite(scores(output)).all()


def test_what_cannot_be_merged_is_told(
    checkpoint: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base, one = checkpoint(), make_adapter("one")
    attention = make_adapter("two", target_modules=["q_proj", "v_proj"])
    dora = make_adapter("three", use_dora=True)
    embeds = make_adapter("six")
    state = load_file(embeds / "adapter_model.safetensors")
    state["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 9)
    save_file(state, embeds / "adapter_model.safetensors")
    biased = make_adapter("seven")
    settings = json.loads((biased / "adapter_config.json").read_text())
    (biased / "adapter_config.json").write_text(json.dumps({**settings, "bias": "lora_only"}))
    wider = checkpoint(intermediate_size=160)
    deeper = checkpoint(num_hidden_layers=3)
    recorded = [make_adapter(name) for name in ("four", "five")]
    for i, folder in enumerate(recorded):
        record = {"template": {"id": "t", "hash": "h"}, "base": {"fingerprint": str(i)}}
        (folder / "qwen3_reranker.json").write_text(json.dumps(record))
    for command, told in {
        "": "got 0 and 0",
        f"--model {base}": "got 1 and 0",
        f"--model {base} {base} --adapter {one}": "got 2 and 1",
        f"--model {base} --adapter {one} --method slerp": "added whole",
        f"--model {base} {base} {base} --method slerp": "got 3",
        f"--model {base} {base} --weights 1": "must be 2 numbers",
        f"--model {base} {base} --weights 1 -1": "not negative",
        f"--model {base} {base} --weights 0 0": "nor all 0",
        f"--model {base} {base} --weights nan 1": "not negative",
        f"--model {base} {deeper}": "has other tensors",
        f"--model {base} {wider}": "has other shapes",
        f"--adapter {one} {attention}": "has other tensors",
        f"--adapter {one} {dora}": "has use_dora",
        f"--adapter {embeds} {embeds}": "changes more than linear layers",
        f"--adapter {one} {biased}": "has bias lora_only",
        f"--adapter {recorded[0]} {recorded[1]}": "trained with another base",
    }.items():
        output = tmp_path / "out"
        assert main(["merge", *shlex.split(command), "--output_dir", str(output)]) == 2, command
        assert told in capsys.readouterr().err, command
        assert not output.exists()
    two = ["--adapter", str(one), str(one)]
    assert main(["merge", *two, "--output_dir", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err

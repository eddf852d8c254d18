"""Layers in 8 and 4 bits: what they compute, how far scores move, and where they are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch.nn.functional import linear as multiply
from transformers import PretrainedConfig

from qwen3_reranker import MissingExtraError, Reranker
from qwen3_reranker.data.demo_corpus import read_sample
from qwen3_reranker.model import loading
from qwen3_reranker.model.loading import load_model
from qwen3_reranker.model.quantized import Int8Linear, Int8Weights, nf4_linear, weights_alone
from tests.real_parts import save_random_adapter

QUERY = "how long does dough rest"
DOCUMENTS = ["an hour, covered", "overnight", "", "A train leaves at nine. " * 20, "bread " * 300]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_layer_is_off_by_its_two_roundings_alone(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(64, 32, bias=bias), torch.randn(*shape)
    with torch.inference_mode():
        step = inputs.abs().amax(dim=-1, keepdim=True) / 127
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        expected = torch.nn.functional.linear(
            (inputs / step).round() * step, (linear.weight / scale).round() * scale, linear.bias
        )
        found = Int8Linear(linear)(inputs)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, linear(inputs), rtol=1e-5, atol=1e-5)


def test_layer_of_zeros_is_zero() -> None:
    linear = torch.nn.Linear(8, 4, bias=False)
    with torch.inference_mode():
        assert not Int8Linear(linear)(torch.zeros(3, 8)).any()
        linear.weight.zero_()
        assert not Int8Linear(linear)(torch.ones(3, 8)).any()


def test_scores_move_by_what_loading_says(checkpoint: Callable[..., Path]) -> None:
    folder = str(checkpoint())
    exact, rounded = (
        load_model(folder, device="cpu", dtype=d, read_sample=read_sample)
        for d in ("float32", "int8")
    )
    assert all(
        isinstance(layer.mlp.up_proj, Int8Linear) for layer in rounded.network.decoder.layers
    )
    assert "off float32's" in rounded.choices["dtype"]
    said = float(rounded.choices["dtype"].split("pairs are ")[1].split()[0])
    scores = [Reranker(folder, device="cpu", dtype=d).score(QUERY, DOCUMENTS)
              for d in ("float32", "int8")]  # fmt: skip
    log_odds = [np.log(row) - np.log1p(-np.array(row)) for row in scores]
    assert 0 < np.abs(log_odds[0] - log_odds[1]).max() < max(10 * said, 0.1)
    assert exact.choices["dtype"].startswith("float32")


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_exact_mode_is_exact(dtype: str, checkpoint: Callable[..., Path]) -> None:
    reranker = Reranker(str(checkpoint()), device="cpu", dtype=dtype, exact=True)
    alone = [reranker.score(QUERY, [document])[0] for document in DOCUMENTS]
    assert reranker.score(QUERY, DOCUMENTS) == alone


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-7), ("float16", 2**-9)]
)
def test_8_bit_weights_are_off_by_their_rounding_alone(
    dtype: str, bound: float, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=bias).to(getattr(torch, dtype))
    inputs = torch.randn(2, 3, 64).to(linear.weight.dtype)
    with torch.inference_mode():
        small = Int8Weights(linear, torch.device("cpu"))
        weight = linear.weight.float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        expected = multiply(inputs.float(), (weight / scale).round() * scale)
        if bias:
            expected += linear.bias
        found = small(inputs)
    assert found.dtype is linear.weight.dtype
    assert small.weight.nbytes == linear.weight.numel()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=4 * bound)


def test_what_is_rounded_depends_on_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert weights_alone("int8", gpu) is Int8Weights
    assert weights_alone("int8", cpu) is None, "products are rounded as well"
    assert weights_alone("nf4", gpu) is weights_alone("nf4", cpu) is nf4_linear
    assert weights_alone("bfloat16", gpu) is weights_alone(None, gpu) is None
    dtype, why = loading._choose_dtype("int8", gpu, PretrainedConfig(dtype=torch.bfloat16))
    assert dtype is torch.bfloat16
    assert why == "asked for; 8 bits a weight, computed in bfloat16"


def test_8_bit_weights_move_scores_less_than_8_bit_products(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scores = str(checkpoint()), {}
    for name, of_weights in (("exact", None), ("products", None), ("weights", Int8Weights)):
        monkeypatch.setattr(
            loading,
            "weights_alone",
            lambda dtype, device, made=of_weights: made if dtype == "int8" else None,
        )
        reranker = Reranker(folder, device="cpu", dtype=None if name == "exact" else "int8")
        scores[name] = np.array(reranker.score(QUERY, DOCUMENTS))
        layer = reranker.loaded.network.decoder.layers[0].mlp.up_proj
        assert isinstance(layer, Int8Weights) is (name == "weights")
        alone = [reranker.score(QUERY, [document])[0] for document in DOCUMENTS]
        np.testing.assert_allclose(alone, scores[name], atol=1e-5)  # company changes nothing
    assert "8 bits a weight, computed in float32" in reranker.loaded.choices["dtype"]
    off = {name: np.abs(row - scores["exact"]).max() for name, row in scores.items()}
    assert 0 < off["weights"] < off["products"]


@pytest.mark.parametrize("bias", [False, True])
def test_4_bit_layer_is_off_by_its_weights_rounding_alone(bias: bool) -> None:
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(128, 64, bias=bias), torch.randn(2, 3, 128)
    with torch.inference_mode():
        exact = linear(inputs)
        small = nf4_linear(linear, torch.device("cpu"))
        weight = dequantize_4bit(small.weight.data, small.weight.quant_state)
        expected = torch.nn.functional.linear(inputs, weight, linear.bias)
        torch.testing.assert_close(small(inputs), expected, rtol=1e-5, atol=1e-5)
    assert small.weight.data.nbytes == linear.weight.nbytes / 8
    assert 0.01 < (expected - exact).abs().mean() < 0.2


def test_4_bit_scores_are_those_of_the_rounded_weights(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint()
    monkeypatch.setattr(loading, "prepacking_pays", lambda dtype: False)  # weights are changed here
    adapter = str(save_random_adapter(tmp_path / "adapter", base))
    exact, rounded = (
        Reranker(str(base), adapter=adapter, device="cpu", dtype=dtype)
        for dtype in ("float32", "nf4")
    )
    plain, layers = exact.loaded.network.decoder, rounded.loaded.network.decoder.layers
    with torch.inference_mode():  # the adapter was merged before weights were rounded
        for layer, small in zip(plain.layers, layers, strict=True):
            for name, linear in layer.named_modules():
                if isinstance(linear, torch.nn.Linear):
                    weight = small.get_submodule(name).weight
                    linear.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    assert "4 bits a weight, computed in float32" in rounded.loaded.choices["dtype"]
    expected = exact.score(QUERY, DOCUMENTS)
    np.testing.assert_allclose(rounded.score(QUERY, DOCUMENTS), expected, atol=1e-5)
    assert np.ptp(expected) > 0.01


def test_4_bits_need_bitsandbytes(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match="dtype 'nf4' needs bitsandbytes"):
        load_model(str(checkpoint()), device="cpu", dtype="nf4")

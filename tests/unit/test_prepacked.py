"""Packed weights compute what they did, and are left alone where they would not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qwen3_reranker.model import cpu_trials, prepacked
from qwen3_reranker.model.cpu_trials import prepacking_pays
from qwen3_reranker.model.prepacked import ERRORS, PrepackedLinear
from tests.real_parts import skip_unless_packed

pays = prepacking_pays.__wrapped__


@pytest.fixture(params=ERRORS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Return a dtype that this CPU packs."""
    found: torch.dtype = request.param
    skip_unless_packed(found)
    return found


def make_linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> Any:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (64, 48), (33, 17), (1024, 3072), (3072, 1024)], ids=str)
def test_packed_layer_equals_the_plain_one(
    dtype: torch.dtype, shape: tuple[int, int], bias: bool
) -> None:
    linear = make_linear(*shape, dtype, bias)
    packed = prepacked.prepacked(linear)
    assert isinstance(packed, PrepackedLinear)
    for rows in (0, 1, 2, 3, 12, 147, 500):
        inputs = torch.randn(1, rows, shape[0]).to(dtype)
        strided = torch.randn(rows, 2, shape[0]).to(dtype)[:, 0]
        for each in (inputs, strided):
            expected, found = linear(each), packed(each)
            assert found.shape == expected.shape
            assert found.dtype is dtype
            bound = ERRORS[dtype] * expected.abs().max().item() if rows else 0
            torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_copy_is_a_plain_layer_of_the_same_weights(dtype: torch.dtype) -> None:
    linear = make_linear(48, 64, dtype)
    copied = copy.deepcopy(torch.nn.ModuleDict({"a": PrepackedLinear(linear)})).float()["a"]
    assert type(copied) is torch.nn.Linear
    assert torch.equal(copied.weight, linear.weight.float())
    assert torch.equal(copied.bias, linear.bias.float())
    assert copied(torch.ones(2, 48)).dtype is torch.float32


def test_layer_that_packing_changes_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear(48, 64, torch.float32)
    off = PrepackedLinear.forward
    monkeypatch.setattr(PrepackedLinear, "forward", lambda self, x: off(self, x) * 1.001)
    assert prepacked.prepacked(linear) is linear
    assert not pays(torch.float32)
    monkeypatch.undo()
    linear.weight[3, 5] = torch.nan
    assert prepacked.prepacked(linear) is linear


@pytest.mark.parametrize("error", [AttributeError("no operation"), RuntimeError("not here")])
def test_torch_that_cannot_pack_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(linear: Any) -> Any:
        raise error

    monkeypatch.setattr(cpu_trials, "least_seconds", lambda calls: [1.0, 0.1])
    monkeypatch.setattr(cpu_trials, "prepacked", fail)
    assert not pays(torch.float32)


@pytest.mark.parametrize(("after", "expected"), [(0.94, True), (0.96, False), (1.1, False)])
def test_packing_pays_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, after: float, expected: bool
) -> None:
    monkeypatch.setattr(cpu_trials, "least_seconds", lambda calls: [1.0, after])
    assert pays(torch.float32) is expected
    assert not pays(torch.float16), "of no dtype that is not packed"


def test_calls_are_timed_in_turn() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        torch.ones(400, 400) @ torch.ones(400, 400)

    def fast() -> None:
        calls.append("fast")

    of_slow, of_fast = cpu_trials.least_seconds([slow, fast])
    assert of_fast < of_slow
    assert calls == ["slow", "fast"] * 7

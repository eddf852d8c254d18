"""The last rows of causal attention: both ways to compute them, and which one is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qwen3_reranker.model import attention_cpu

WAYS = {"kernel": attention_cpu.tail_by_kernel, "blocks": attention_cpu.tail_in_blocks}
LENGTHS = [(1, 0), (1, 9), (63, 0), (64, 75), (65, 75), (130, 1), (300, 700), (700, 30)]
"""Queries, and keys before them: of whole blocks, of a token more, past the maskless limit."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def draw(
    length: int, before: int, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 2)
) -> list[torch.Tensor]:
    """Queries as layers leave them, heads of a token beside each other; keys; values."""
    generator = torch.Generator().manual_seed(length)
    num_keys = before + length
    return [
        torch.randn(1, tokens, count, 16, generator=generator).transpose(1, 2).to(dtype)
        for tokens, count in ((length, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]))
    ]


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = query.float(), key.float(), value.float()
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(16)
    length, num_keys = scores.shape[2:]
    sees = torch.ones(length, num_keys, dtype=torch.bool).tril(num_keys - length)
    return scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(("way", "step"), [("kernel", 1), ("kernel", 32), ("blocks", 1)])
@pytest.mark.parametrize(("length", "before"), LENGTHS)
def test_both_ways_equal_the_definition(
    way: str,
    step: int,
    length: int,
    before: int,
    heads: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_cpu, "size_step", lambda device, dtype: step)
    inputs = draw(length, before, heads=heads)
    kept = [tensor.clone() for tensor in inputs]
    output = WAYS[way](*inputs, 0.25)
    torch.testing.assert_close(output, by_definition(*inputs), atol=2e-6, rtol=1e-5)
    assert all(map(torch.equal, inputs, kept)), "inputs are read again"


@pytest.mark.parametrize("most", [0, 500_000, 10**9])  # heads at once: one, four and two, all six
def test_heads_that_take_turns_change_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(200, 75, heads=(12, 6))
    monkeypatch.setattr(attention_cpu, "_BLOCK_BYTES", most)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    output = attention_cpu.tail_in_blocks(*inputs, 0.25)
    torch.testing.assert_close(output, by_definition(*inputs), atol=2e-6, rtol=1e-5)


def test_the_kernel_sees_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may compile one more for each, and keep it for ever."""
    sizes, real = set(), attention_cpu.sdpa

    def record(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.add((query.shape[2], key.shape[2]))
        return real(query, key, *args, **kwargs)

    monkeypatch.setattr(attention_cpu, "sdpa", record)
    monkeypatch.setattr(attention_cpu, "size_step", lambda device, dtype: 32)
    for before in range(60, 124, 3):
        for length in (*range(1, 300, 7), 600, 601):
            attention_cpu.tail_by_kernel(*draw(length, before), 0.25)
    assert {size % 32 for pair in sizes for size in pair} == {0}
    assert len(sizes) < 60  # of 990 pairs


@pytest.mark.parametrize("most", [0, 2**18], ids=["too large to keep", "kept"])
def test_masks_are_right_whatever_was_asked_before(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention_cpu._cached_mask.cache_clear()
    monkeypatch.setattr(attention_cpu, "_KEPT_MASK", most)
    for length, before in ((5, 75), (130, 75), (17, 90), (128, 65), (129, 128)):
        inputs = draw(length, before)
        output = attention_cpu.tail_by_kernel(*inputs, 0.25)
        torch.testing.assert_close(output, by_definition(*inputs), atol=2e-6, rtol=1e-5)
    assert attention_cpu._cached_mask.cache_info().currsize == (4 if most else 0)  # 8 to 256 rows


def test_a_mask_that_serving_made_can_be_trained_with() -> None:
    attention_cpu._cached_mask.cache_clear()
    attention_cpu.tail_by_kernel(*draw(20, 5), 0.25)
    with torch.inference_mode(False):
        inputs = [tensor.clone().requires_grad_() for tensor in draw(20, 5)]
        attention_cpu.tail_by_kernel(*inputs, 0.25).sum().backward()
    assert attention_cpu._cached_mask.cache_info().hits == 1
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "before"), LENGTHS)
def test_half_precision_is_as_near_as_the_kernel(
    length: int, before: int, dtype: torch.dtype
) -> None:
    inputs = draw(length, before, dtype)
    expected = by_definition(*inputs)
    off = {name: (way(*inputs, 0.25) - expected).abs().mean() for name, way in WAYS.items()}
    # Scores rounded to bfloat16, as plain products leave them, are off four times as much.
    assert off["blocks"] <= 1.5 * off["kernel"]


def test_scores_past_half_precision_do_not_overflow() -> None:
    query, key, value = (tensor * 40 for tensor in draw(70, 5, torch.float16))
    for way in WAYS.values():
        output = way(query * 40, key * 40, value, 1.0)  # scores of some millions
        assert output.isfinite().all()


@pytest.mark.parametrize(
    ("pays", "length", "is_inference", "expected"),
    [
        (True, 768, True, "blocks"),
        (True, 769, True, "kernel"),  # too long
        (True, 250, True, "blocks"),  # 4 * 250 * 250 * 16 products
        (True, 249, True, "kernel"),  # too few
        (False, 500, True, "kernel"),
        (True, 500, False, "kernel"),
    ],
)
def test_blocks_are_taken_for_serving_where_they_pay(
    pays: bool, length: int, is_inference: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name in ("tail_by_kernel", "tail_in_blocks"):
        monkeypatch.setattr(attention_cpu, name, lambda q, k, v, s, name=name: taken.append(name))
    monkeypatch.setattr(attention_cpu, "blocks_pay", lambda dtype, sizes: pays)
    with torch.inference_mode(is_inference):
        attention_cpu.attend_tail(*draw(length, 0), 0.25)
    assert taken[0].endswith(expected)


@pytest.mark.parametrize(("blocks", "expected"), [(0.94, True), (0.96, False), (1.1, False)])
def test_blocks_pay_where_they_are_clearly_faster(
    blocks: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "least_seconds", lambda calls: [1.0, blocks])
    assert attention_cpu.blocks_pay.__wrapped__(torch.bfloat16, (4, 2, 16)) is expected
    for dtype in (torch.float32, torch.float16):
        assert not attention_cpu.blocks_pay.__wrapped__(dtype, (4, 2, 16)), "it gains nothing"


@pytest.mark.parametrize("off", [0.1, math.nan])
def test_blocks_that_compute_something_else_never_pay(
    off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "least_seconds", lambda calls: [1.0, 0.1])
    assert attention_cpu.blocks_pay.__wrapped__(torch.bfloat16, (4, 2, 16))
    real = attention_cpu.tail_in_blocks
    monkeypatch.setattr(attention_cpu, "tail_in_blocks", lambda *args: real(*args) + off)
    assert not attention_cpu.blocks_pay.__wrapped__(torch.bfloat16, (4, 2, 16))

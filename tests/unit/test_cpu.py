"""What is decided by the instructions a CPU has."""

from __future__ import annotations

import pytest
import torch

from qwen3_reranker.model import cpu_trials


@pytest.mark.parametrize(
    ("has", "device", "dtype", "expected"),
    [
        ("amx_bf16", "cpu", torch.bfloat16, 32),
        ("amx_bf16", "cuda", torch.bfloat16, 1),
        ("amx_bf16", "cpu", torch.float16, 1),
        ("amx_bf16", "cpu", torch.float32, 1),
        ("avx512_bf16", "cpu", torch.bfloat16, 1),
    ],
)
def test_sizes_are_rounded_for_amx_alone(
    has: str, device: str, dtype: torch.dtype, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    assert cpu_trials.size_step.__wrapped__(torch.device(device), dtype) == expected

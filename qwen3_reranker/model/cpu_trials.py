"""What this CPU multiplies fastest: measured, because to have instructions is not enough.

Knows nothing of checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import inf
from time import thread_time

import torch

from .prepacked import ERRORS, PrepackedLinear, prepacked


@cache
def bfloat16_pays() -> bool:
    """Say whether this CPU multiplies bfloat16 clearly faster than float32.

    AVX512-BF16 doubles the rate of a Zen 4 and halves that of an Emerald Rapids without AMX.
    """
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False
    wide, narrow = least_seconds(
        [_trial(_layer(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    )
    return narrow < 0.8 * wide


@cache
def prepacking_pays(dtype: torch.dtype) -> bool:
    """Say whether torch can pack weights of a dtype here, and they are clearly faster.

    A Zen 4 gains a fifth in float32, an Emerald Rapids nothing.
    """
    if dtype not in ERRORS:
        return False
    plain = _layer(dtype)
    try:
        packed = prepacked(plain)
    except (AttributeError, RuntimeError):
        return False
    if not isinstance(packed, PrepackedLinear):
        return False
    before, after = least_seconds([_trial(plain), _trial(packed)])
    return after < 0.95 * before


@cache
def size_step(device: torch.device, dtype: torch.dtype) -> int:
    """Return what the sizes of matrices should be multiples of, 1 if all are as good.

    AMX multiplies 16 rows at once, two times two tiles best, and for every other size kernels are
    compiled: up to 7 ms for a matrix that takes 1, and torch's attention never gives them back,
    0.15 MB for each of 2,000 documents and 1 MB for longer ones (benchmarks/RESULTS.md).
    """
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return 1
    return 32 if torch.cpu.get_capabilities().get("amx_bf16") else 1


@torch.inference_mode()
def least_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Return the least seconds that each call takes, in turn with the others.

    Of this thread alone, so that other work on the machine does not decide.
    """
    least = [inf] * len(calls)
    for _ in range(7):
        for place, call in enumerate(calls):
            start = thread_time()
            call()
            least[place] = min(least[place], thread_time() - start)
    return least


def _layer(dtype: torch.dtype) -> torch.nn.Linear:
    layer = torch.nn.Linear(1024, 3072, bias=False, device="meta", dtype=dtype)
    layer.weight = torch.nn.Parameter(torch.ones(3072, 1024, dtype=dtype), requires_grad=False)
    return layer


def _trial(layer: torch.nn.Linear | PrepackedLinear) -> Callable[[], object]:
    """Return a call of the layer with 128 rows."""
    rows = torch.ones(128, 1024, dtype=layer.weight.dtype)
    return lambda: layer(rows)

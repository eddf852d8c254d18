"""Attention of a pack as sequences of unequal length: what CUDA's kernels take, without padding.

Queries stay where they are in the row; keys and values are gathered, so that each document finds
its head before it. Where heads would be copied too often, documents attend to them in a second call
and both results are merged by their log-sum-exp, which carries no gradient. Decides lengths and
positions in plain numpy. Knows nothing of layers.

`torch.nn.attention.varlen` (FlashAttention) computes half precision only. Its causal window is
taken to end at the bottom right; `attention.check_varlen` proves it on the device before use.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.packing import Pack

_MOST_COPIES = 4
"""Keys gathered for each token of the row before heads are read where they are."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Arguments of one kernel call.

    Attributes:
        queries_at: Rows that ask, or None for all of the row in its order.
        keys_at: Places of the keys in [outside of each span | row].
        cu_queries: Cumulative lengths, int32, shape (sequences + 1,).
        cu_keys: As `cu_queries`.
        max_queries: Longest sequence of queries.
        max_keys: Longest sequence of keys.
    """

    queries_at: torch.Tensor | None
    keys_at: torch.Tensor
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One causal call, and where heads are not copied a second one from documents to heads."""

    causal: Sequences
    heads: Sequences | None


def plan_sequences(pack: Pack, device: torch.device, *, may_merge: bool = True) -> Plan:
    """Lay a pack out for the kernel.

    Args:
        pack: The pack.
        device: Where its tensors are.
        may_merge: Whether heads may get a call of their own; not with gradients.
    """
    heads, own = [], []  # per span; per sequence of the row: its span and its rows
    start = 0
    num_outside = sum(0 if s.outside is None else len(s.outside) for s in pack.spans)
    for i, span in enumerate(pack.spans):
        length = 0 if span.outside is None else len(span.outside)
        rows = np.arange(span.head.start, span.head.stop)
        heads.append(np.concatenate([np.arange(start, start + length), rows + num_outside]))
        start += length
        own += [(i, rows, False)] if len(rows) else []
        own += [(i, np.arange(d.start, d.stop), True) for d in span.documents]
    copies = sum(len(heads[i]) + len(rows) for i, rows, is_document in own if is_document)
    merges = may_merge and copies > _MOST_COPIES * len(pack.token_ids)
    keys = []
    for i, rows, is_document in own:
        if not is_document:
            keys.append(heads[i])
        elif merges:
            keys.append(rows + num_outside)
        else:
            keys.append(np.concatenate([heads[i], rows + num_outside]))
    causal = _sequences([rows for _, rows, _ in own], keys, device, whole_row=True)
    if not merges:
        return Plan(causal, None)
    asking = [np.arange(s.documents[0].start, s.documents[-1].stop) for s in pack.spans]
    return Plan(causal, _sequences(asking, heads, device, whole_row=False))


def _sequences(
    queries: Sequence[NDArray[np.int64]],
    keys: Sequence[NDArray[np.int64]],
    device: torch.device,
    *,
    whole_row: bool,
) -> Sequences:
    lengths = [[len(rows) for rows in side] for side in (queries, keys)]
    cu_queries, cu_keys = (
        torch.tensor([0, *np.cumsum(side)], dtype=torch.int32, device=device) for side in lengths
    )
    return Sequences(
        None if whole_row else torch.from_numpy(np.concatenate(queries)).to(device),
        torch.from_numpy(np.concatenate(keys)).to(device),
        cu_queries,
        cu_keys,
        max(lengths[0]),
        max(lengths[1]),
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float,
) -> torch.Tensor:
    """Attend by a plan.

    Args:
        query: Shape (tokens, heads, head size).
        key: Of [outside of each span | row], shape (outside + tokens, key heads, head size).
        value: As `key`.
        plan: Of the pack.
        scaling: Factor of the scores before the softmax.

    Returns:
        Shape (tokens, heads, head size).
    """
    if plan.heads is None:
        output, _ = _call(query, key, value, plan.causal, scaling, is_causal=True, merges=False)
        return output
    output, own = _call(query, key, value, plan.causal, scaling, is_causal=True, merges=True)
    shared, of_head = _call(query, key, value, plan.heads, scaling, is_causal=False, merges=True)
    rows = plan.heads.queries_at
    # Both softmaxes over their own keys become one over all: weights exp(lse) / sum of them.
    weight = torch.sigmoid(of_head - own[rows])[..., None]  # (rows, heads, 1), float32
    merged = shared.float() * weight + output[rows].float() * (1 - weight)
    output[rows] = merged.to(output.dtype)
    return output


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scaling: float,
    *,
    is_causal: bool,
    merges: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the kernel's output and, if asked for, its log-sum-exp (queries, heads)."""
    from torch.nn.attention.varlen import AuxRequest

    if sequences.queries_at is not None:
        query = query[sequences.queries_at]
    result: Any = kernel()(
        query,
        key[sequences.keys_at],
        value[sequences.keys_at],
        sequences.cu_queries,
        sequences.cu_keys,
        sequences.max_queries,
        sequences.max_keys,
        scale=scaling,
        window_size=(-1, 0) if is_causal else (-1, -1),
        enable_gqa=True,
        return_aux=AuxRequest(lse=True) if merges else None,
    )
    if not merges:
        return result, torch.empty(0)
    output, lse = result
    return output, lse.T  # (heads, queries), whatever its docstring says; `check_varlen` proves it


@cache
def kernel() -> Callable[..., Any]:
    """Return torch's kernel, with one order of summation whatever the company where it has that."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, num_splits=1) if "num_splits" in known else varlen_attn

"""Attention over a pack: each document sees its head and itself, never its neighbours.

One function is registered with transformers under one name; the pack travels in its `prepared`
keyword and names its backend, so no setting of a model or of the library is ever changed. Without
a pack the function is the library's own causal attention. Knows nothing of text, ids or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..engine.packing import Group, Pack, Seat, Span, build_pack
from . import attention_cuda
from .attention_cpu import attend_tail, blocks_pay, tail_mask
from .prefix_cache import KeyValues

NAME = "qwen3_reranker_pack"

Outside: TypeAlias = tuple[torch.Tensor, torch.Tensor] | None
"""Keys and values of a head's beginning that is not in the row, in one layer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A pack on its way through the layers.

    Attributes:
        pack: Layout of the row.
        outside: For each span, what its head's beginning left in each layer.
        plan: What the varlen backend needs, None for the others.
    """

    pack: Pack
    outside: Sequence[KeyValues | None]
    plan: attention_cuda.Plan | None


def prepare(pack: Pack, outside: Sequence[KeyValues | None], device: torch.device) -> Prepared:
    """Return what each layer's attention needs, computed once."""
    plan = None
    if pack.backend == "varlen":
        plan = attention_cuda.plan_sequences(pack, device, may_merge=not torch.is_grad_enabled())
    return Prepared(pack, outside, plan)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    prepared: Prepared | None = None,
    captured: KeyValues | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within the documents of a pack.

    Args:
        module: The attention layer, as transformers passes it.
        query: Shape (1, heads, tokens, head size). Tokens after the pack's get zeros.
        key: Shape (1, key heads, tokens, head size).
        value: As `key`.
        attention_mask: Only without a pack.
        scaling: Factor of the scores before the softmax.
        prepared: The pack; None for plain causal attention.
        captured: Gets this layer's keys and values; only without a pack.
        kwargs: Other settings transformers sends; only meaningful without a pack.

    Returns:
        The output, shape (1, tokens, heads, head size), and None for the weights.
    """
    if prepared is None:
        if captured is not None:
            captured.append((key, value))
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output, None
    layer: Any = getattr(module, "layer_idx", None)
    outside = [None if layers is None else layers[layer] for layers in prepared.outside]
    if prepared.plan is not None:
        return _attend_varlen(query, key, value, prepared.plan, outside, scaling), None
    attend = BACKENDS[prepared.pack.backend]
    spans = zip(prepared.pack.spans, outside, strict=True)
    outputs = [attend(query, key, value, span, beginning, scaling) for span, beginning in spans]
    beyond = query.shape[2] - len(prepared.pack.token_ids)
    if beyond:
        outputs.append(query.new_zeros(1, beyond, query.shape[1], query.shape[3]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: Span,
    outside: Outside,
    scaling: float,
) -> torch.Tensor:
    """Each document by itself over [head; document], without padding."""
    row = slice(span.head.start, span.documents[-1].stop)
    lengths = [part.stop - part.start for part in (span.head, *span.documents)]
    if len(span.documents) == 1:  # it may be long, and its head needs no call of its own
        lengths = [0, row.stop - row.start]
    # Split once: in training a slice per document would each fill a gradient of the whole row.
    (q_head, *queries), (k_head, *keys), (v_head, *values) = (
        torch.split(tensor[:, :, row], lengths, dim=2) for tensor in (query, key, value)
    )
    if outside is not None:
        k_head, v_head = _behind(outside, k_head, v_head)
    outputs = []
    if lengths[0]:
        outputs.append(attend_tail(q_head, k_head, v_head, scaling))
    before = k_head.shape[2]
    for own, own_keys, own_values in zip(queries, keys, values, strict=True):
        seen = torch.cat([k_head, own_keys], dim=2) if before else own_keys
        read = torch.cat([v_head, own_values], dim=2) if before else own_values
        outputs.append(attend_tail(own, seen, read, scaling))
    # Kernels leave heads beside each other, so that joined in this order they are copied once.
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _behind(
    outside: tuple[torch.Tensor, torch.Tensor], key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values with those of the head's beginning before them."""
    return torch.cat([outside[0], key], dim=2), torch.cat([outside[1], value], dim=2)


def _attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: Span,
    outside: Outside,
    scaling: float,
) -> torch.Tensor:
    """All documents of a group in one padded, masked call: runs everywhere, and is the oracle."""
    start, stop = span.head.start, span.documents[-1].stop
    query, key, value = (tensor[:, :, start:stop] for tensor in (query, key, value))
    num_outside = 0
    if outside is not None:
        num_outside = outside[0].shape[2]
        key, value = _behind(outside, key, value)
    head = span.head.stop - start  # rows of the head that ask
    num_head = num_outside + head
    lengths = torch.tensor([d.stop - d.start for d in span.documents], device=query.device)
    starts = torch.tensor([d.start - start for d in span.documents], device=query.device)
    offset = torch.arange(int(lengths.max()), device=query.device)
    own = starts[:, None] + offset.clamp(max=lengths[:, None] - 1)  # (documents, longest)
    shared = torch.arange(num_head, device=query.device).expand(len(own), -1)
    keys_at = torch.cat([shared, own + num_outside], dim=1)  # (documents, P + longest)
    repeat = query.shape[1] // key.shape[1]
    keys, values = (
        t[0].repeat_interleave(repeat, dim=0)[:, keys_at].transpose(0, 1) for t in (key, value)
    )
    output = sdpa(
        query[0][:, own].transpose(0, 1),
        keys,
        values,
        attn_mask=tail_mask(query, num_head, len(offset)),
        scale=scaling,
    )  # (documents, heads, longest, head size); padded rows hold copies that are dropped here
    documents = output.transpose(1, 2)[offset < lengths[:, None]][None]
    if not head:
        return documents
    rows = attend_tail(query[:, :, :head], key[:, :, :num_head], value[:, :, :num_head], scaling)
    return torch.cat([rows.transpose(1, 2), documents], dim=1)


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: attention_cuda.Plan,
    outside: Sequence[Outside],
    scaling: float,
) -> torch.Tensor:
    """Attend by CUDA's kernel for sequences of unequal length, shape (1, tokens, heads, size)."""
    beginnings = [pair for pair in outside if pair is not None]
    if beginnings:
        key, value = (
            torch.cat([*parts, row], dim=2)
            for parts, row in zip(zip(*beginnings, strict=True), (key, value), strict=True)
        )
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attention_cuda.attend(queries, keys, values, plan, scaling)[None]


def check_varlen(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> str:
    """Compare the varlen backend with the padded one on random numbers; return what is wrong.

    A mask that is off by a token moves outputs by tenths, rounding to half precision by hundredths.

    Args:
        device: Where the model runs.
        dtype: The dtype it runs in.
        sizes: Heads, key heads and head size.

    Returns:
        Why the backend cannot be used here, empty if it can.
    """
    heads, key_heads, size = sizes
    groups = [
        Group(np.zeros(num_head, np.int32), [np.zeros(n, np.int32) for n in lengths])
        for num_head, lengths in ((70, [1, 130, 12]), (9, [30, 2]), (200, [3] * 40))
    ]
    generator = torch.Generator(device).manual_seed(0)
    try:
        for cached, has_grad in product((0, 5), (True, False)):  # without, heads are not copied
            seats = [
                Seat(g, tuple(range(len(group.documents))), cached)
                for g, group in enumerate(groups)
            ]
            packs = {name: build_pack(groups, seats, backend=name) for name in ("padded", "varlen")}
            num_tokens = len(packs["padded"].token_ids)

            def draw(heads: int, tokens: int) -> torch.Tensor:
                shape = (1, heads, tokens, size)
                return torch.randn(shape, generator=generator, device=device).to(dtype)

            query, key, value = (draw(n, num_tokens) for n in (heads, key_heads, key_heads))
            left: list[KeyValues | None] = [
                [(draw(key_heads, cached), draw(key_heads, cached))] if cached else None
                for _ in groups
            ]
            module = torch.nn.Module()
            module.layer_idx = 0  # type: ignore[assignment]
            with torch.set_grad_enabled(has_grad):
                expected, found = (
                    packed_attention(
                        module, query, key, value, None,
                        scaling=size**-0.5, prepared=prepare(pack, left, device),
                    )[0]
                    for pack in packs.values()
                )  # fmt: skip
            largest = (expected.float() - found.float()).abs().max().item()
            if not largest <= 0.05:
                return f"it differs from padded attention by {largest:.2g}"
    except Exception as error:  # whatever a kernel raises, there is a backend that runs
        return f"{type(error).__name__} in its check"
    return ""


Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Span, Outside, float], torch.Tensor]

BACKENDS: dict[str, Backend] = {"documents": _attend_documents, "padded": _attend_padded}


def choose_backend(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> tuple[str, str]:
    """Return the backend and the reason, for `doctor` to print.

    Args:
        device: Where the model runs.
        dtype: The dtype it runs in.
        sizes: Heads, key heads and head size.
    """
    if device.type == "cpu":
        how = ", in blocks, which is faster on this CPU" if blocks_pay(dtype, sizes) else ""
        return "documents", f"CPU: each document by itself, unpadded{how}"
    if device.type != "cuda":
        return "padded", f"{device.type}: masked attention runs everywhere, untested here"
    if dtype is torch.float32:
        return "padded", "CUDA in float32: the unpadded kernel computes half precision only"
    problem = check_varlen(device, dtype, sizes)
    if problem:
        return "padded", f"CUDA: the unpadded kernel is off, {problem}"
    return "varlen", "CUDA: unpadded, checked against masked attention"


AttentionInterface.register(NAME, packed_attention)

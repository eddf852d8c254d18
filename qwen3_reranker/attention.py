"""Attention over a pack: each document sees its head and itself, never its neighbours.

One function is registered with transformers under one name; the pack travels in its `pack`
keyword and names its backend, so no setting of a model or of the library is ever changed. Without
a pack the function is the library's own causal attention. Knows nothing of text, ids or scores.

`is_causal` is never used where queries and keys differ in number: torch aligns that mask at the
top left on CPU, so a document would lose sight of its own beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .packing import Pack, Span

NAME = "qwen3_reranker_pack"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    pack: Pack | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within the documents of a pack.

    Args:
        module: The attention layer, as transformers passes it.
        query: Shape (1, heads, tokens, head size).
        key: Shape (1, key heads, tokens, head size).
        value: As `key`.
        attention_mask: Only without a pack.
        scaling: Factor of the scores before the softmax.
        pack: Layout of the row; None for plain causal attention.
        kwargs: Other settings transformers sends; only meaningful without a pack.

    Returns:
        The output, shape (1, tokens, heads, head size), and None for the weights.
    """
    if pack is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output, None
    attend = BACKENDS[pack.backend]
    outputs = [attend(query, key, value, span, scaling) for span in pack.spans]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scaling: float
) -> torch.Tensor:
    """One kernel call per document over [head; document], without padding."""
    head = span.head
    row = slice(head.start, span.documents[-1].stop)
    if len(span.documents) == 1:
        return _causal(query[:, :, row], key[:, :, row], value[:, :, row], scaling)
    num_head = head.stop - head.start
    lengths = [document.stop - document.start for document in span.documents]
    # Split once: in training a slice per document would each fill a gradient of the whole row.
    (q_head, *q_own), (k_head, *k_own), (v_head, *v_own) = (
        tensor[:, :, row].split([num_head, *lengths], dim=2) for tensor in (query, key, value)
    )
    outputs = [_causal(q_head, k_head, v_head, scaling)]
    longest = max((n for n in lengths if not _skips_mask(num_head, n)), default=0)
    # Row i of a document sees the head and its own tokens 0..i; a shorter one uses a corner.
    mask = query.new_ones(longest, num_head + longest, dtype=torch.bool).tril(num_head)
    for length, own, own_keys, own_values in zip(lengths, q_own, k_own, v_own, strict=True):
        keys = torch.cat([k_head, own_keys], dim=2)
        values = torch.cat([v_head, own_values], dim=2)
        if _skips_mask(num_head, length):
            queries = torch.cat([q_head, own], dim=2)
            outputs.append(_causal(queries, keys, values, scaling)[:, :, num_head:])
        else:
            corner = mask[:length, : num_head + length]
            outputs.append(
                sdpa(own, keys, values, attn_mask=corner, scale=scaling, enable_gqa=True)
            )
    return torch.cat(outputs, dim=2)


def _skips_mask(num_head: int, length: int) -> bool:
    """Say whether a document is attended together with its head and without a mask.

    The kernel then skips the upper triangle, which pays for the head's queries computed again:
    `python -m benchmarks.choices` finds both equal at 500 tokens, and this ahead beyond.
    """
    return length >= max(512, 2 * num_head)


def _attend_padded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scaling: float
) -> torch.Tensor:
    """All documents of a group in one padded, masked call: runs everywhere, and is the oracle."""
    head = span.head
    num_head = head.stop - head.start
    lengths = torch.tensor([d.stop - d.start for d in span.documents], device=query.device)
    starts = torch.tensor([d.start for d in span.documents], device=query.device)
    offset = torch.arange(int(lengths.max()), device=query.device)
    own = starts[:, None] + offset.clamp(max=lengths[:, None] - 1)  # (documents, longest)
    shared = torch.arange(head.start, head.stop, device=query.device).expand(len(own), -1)
    keys_at = torch.cat([shared, own], dim=1)  # (documents, P + longest)
    repeat = query.shape[1] // key.shape[1]
    keys, values = (
        t[0].repeat_interleave(repeat, dim=0)[:, keys_at].transpose(0, 1) for t in (key, value)
    )
    mask = torch.ones(len(offset), num_head + len(offset), dtype=torch.bool, device=query.device)
    output = sdpa(
        query[0][:, own].transpose(0, 1),
        keys,
        values,
        attn_mask=mask.tril(num_head),
        scale=scaling,
    )  # (documents, heads, longest, head size); padded rows hold copies that are dropped here
    documents = output.transpose(1, 2)[offset < lengths[:, None]].transpose(0, 1)[None]
    return torch.cat(
        [_causal(query[:, :, head], key[:, :, head], value[:, :, head], scaling), documents], dim=2
    )


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    return sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Span, float], torch.Tensor]

BACKENDS: dict[str, Backend] = {"documents": _attend_documents, "padded": _attend_padded}


def choose_backend(device: torch.device) -> tuple[str, str]:
    """Return the backend for a device and the reason, for `doctor` to print."""
    if device.type == "cpu":
        return "documents", "CPU: one unpadded kernel call per document"
    return "padded", f"{device.type}: no unpadded backend yet, masked attention runs everywhere"


AttentionInterface.register(NAME, packed_attention)

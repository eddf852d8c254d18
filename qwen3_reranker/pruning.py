"""The last layer of a decoder, computed only where a score is read.

A document's score needs one token of the last layer. There, keys and values of all tokens are
needed, but queries, output projection and MLP of the last tokens alone: the rest is dropped, which
is exact and spares about 3 % of the work of 28 layers. Used only where the self-test passes with
it. Knows nothing of ids or scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.models.llama import modeling_llama

from .attention import Prepared


def last_layer(
    layer: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    prepared: Prepared,
) -> torch.Tensor:
    """Return the layer's output at each document's last token.

    Args:
        layer: A Qwen3, Qwen2 or Llama decoder layer of transformers.
        hidden: Output of the layer before, shape (1, tokens, hidden).
        rotary: Cosines and sines of all tokens, shape (1, tokens, head size) each.
        prepared: The pack.

    Returns:
        Shape (documents, hidden).
    """
    attention, last = layer.self_attn, prepared.pack.last_tokens
    normed = layer.input_layernorm(hidden)
    query = _heads(attention, "q", normed[:, last])
    key = _rotate(_heads(attention, "k", normed), *rotary)
    value = _heads(attention, "v", normed)
    query = _rotate(query, *(table[:, last] for table in rotary))
    attended: list[torch.Tensor] = []  # (1, heads, 1, head size) of each document
    for span, layers in zip(prepared.pack.spans, prepared.outside, strict=True):
        heads = [[tensor[:, :, span.head]] for tensor in (key, value)]
        if layers is not None:
            heads = [
                [beginning, *own]
                for beginning, own in zip(layers[attention.layer_idx], heads, strict=True)
            ]
        for document in span.documents:  # it sees its head and all of itself
            keys, values = (
                torch.cat([*head, tensor[:, :, document]], dim=2)
                for head, tensor in zip(heads, (key, value), strict=True)
            )
            one = query[:, :, len(attended) : len(attended) + 1]
            attended.append(sdpa(one, keys, values, scale=attention.scaling, enable_gqa=True))
    joined = torch.cat(attended, dim=2).transpose(1, 2).flatten(2)  # (1, documents, heads * size)
    output = hidden[:, last] + attention.o_proj(joined)
    result: torch.Tensor = output + layer.mlp(layer.post_attention_layernorm(output))
    return result[0]


def _heads(attention: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Return queries, keys or values, shape (1, heads, tokens, head size)."""
    projected: torch.Tensor = getattr(attention, f"{name}_proj")(hidden)
    projected = projected.view(*hidden.shape[:2], -1, attention.head_dim)
    if hasattr(attention, f"{name}_norm"):  # Qwen3 normalises queries and keys
        projected = getattr(attention, f"{name}_norm")(projected)
    return projected.transpose(1, 2)


def _rotate(tensor: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    halves: Any = modeling_llama.rotate_half
    rotated: torch.Tensor = tensor * cosines[:, None] + halves(tensor) * sines[:, None]
    return rotated

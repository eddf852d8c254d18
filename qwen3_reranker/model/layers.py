"""Decoder layers without waste: a stock layer's own modules, called in place.

What transformers computes, in three ways cheaper. Sums, norms, rotations and gates overwrite what
nobody reads again instead of filling new memory, which on a CPU costs as much as computing them,
and on a GPU a norm is one kernel instead of eight. A CPU normalises and rotates a strip of tokens
at a time, in float32 and in its cache, and rounds once where transformers rounds after each step.
And of the last layer a score needs one token per document: on a CPU keys and values are computed of
all, queries, output projection and MLP of those tokens alone, which spares about 3 % of the work of
28 layers. For inference; used only where the self-test passes with it. Knows nothing of ids or
scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch.nn.functional import rms_norm, silu
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .attention import Prepared, packed_attention

_STRIP = 2**17
"""Numbers that are worked on from the first operation to the last, as a core's cache holds them."""

Rotary: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of all tokens, shape (1, tokens, head size) each."""


def run_layer(layer: Any, hidden: torch.Tensor, rotary: Rotary, prepared: Prepared) -> torch.Tensor:
    """Return what a layer computes of every token.

    Args:
        layer: A Qwen3, Qwen2 or Llama decoder layer of transformers.
        hidden: Output of the layer before, shape (1, tokens, hidden).
        rotary: Of these tokens.
        prepared: The pack.

    Returns:
        Shape (1, tokens, hidden).
    """
    attention = layer.self_attn
    normed = _normalise(layer.input_layernorm, hidden)
    query, key, value = (
        _heads(attention, name, normed, turned).transpose(1, 2)
        for name, turned in (("q", rotary), ("k", rotary), ("v", None))
    )
    attended, _ = packed_attention(
        attention, query, key, value, None, scaling=attention.scaling, prepared=prepared
    )
    return _feed_forward(layer, attention.o_proj(attended.flatten(2)).add_(hidden))


def last_layer(
    layer: Any, hidden: torch.Tensor, rotary: Rotary, prepared: Prepared
) -> torch.Tensor:
    """Return what a layer computes of each document's last token; arguments as of `run_layer`.

    Of as many rows as there are documents, which is a size of its own, but of one layer alone.

    Returns:
        Shape (documents, hidden).
    """
    attention, last = layer.self_attn, prepared.pack.last_tokens
    normed = _normalise(layer.input_layernorm, hidden)
    of_last = rotary[0][:, last], rotary[1][:, last]
    query = _heads(attention, "q", normed[:, last], of_last).transpose(1, 2)
    key = _heads(attention, "k", normed, rotary).transpose(1, 2)
    value = _heads(attention, "v", normed, None).transpose(1, 2)
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
    return _feed_forward(layer, attention.o_proj(joined).add_(hidden[:, last]))[0]


def _heads(attention: Any, name: str, hidden: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """Return queries, keys or values, shape (1, tokens, heads, head size)."""
    projected: torch.Tensor = getattr(attention, f"{name}_proj")(hidden)
    heads = projected.view(*hidden.shape[:2], -1, attention.head_dim)
    if rotary is None:
        return heads
    norm = getattr(attention, f"{name}_norm", None)  # Qwen3 normalises queries and keys
    if hidden.device.type == "cuda":
        return _rotate(heads if norm is None else _normalise_at_once(norm, heads), *rotary)
    for strip, cosines, sines in _in_strips(heads, *rotary):
        exact = strip.to(torch.float32, copy=True)
        if norm is not None:
            _scale(norm, exact)
        strip.copy_(_rotate(exact, cosines.float(), sines.float()))
    return heads


def _feed_forward(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    normed, mlp = _normalise(layer.post_attention_layernorm, hidden), layer.mlp
    gate = mlp.gate_proj(normed)
    gate = silu(gate, inplace=True) if isinstance(mlp.act_fn, torch.nn.SiLU) else mlp.act_fn(gate)
    output: torch.Tensor = mlp.down_proj(gate.mul_(mlp.up_proj(normed))).add_(hidden)
    return output


def _normalise(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square, found in float32, and scale; in new memory."""
    if hidden.device.type == "cuda":  # on a CPU it is slower than what follows
        return _normalise_at_once(norm, hidden)
    normed = torch.empty_like(hidden)
    for strip, into in _in_strips(hidden, normed):
        into.copy_(_scale(norm, strip.to(torch.float32, copy=True)))
    return normed


def _in_strips(wide: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same tokens, dimension 1, of every tensor: of the first at most `_STRIP` numbers.

    More for each thread, as every one takes its part of them.
    """
    numbers = _STRIP * torch.get_num_threads()
    tokens = max(1, numbers * wide.shape[1] // wide.numel())
    return zip(*(torch.split(each, tokens, dim=1) for each in (wide, *others)), strict=True)


def _scale(norm: Any, exact: torch.Tensor) -> torch.Tensor:
    """Divide float32 numbers by their root mean square and multiply by the weight, in place."""
    length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    factor = length.square_().div_(exact.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return exact.mul_(factor).mul_(norm.weight)


def _normalise_at_once(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn the first half of every head against the second, in place."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    # A pair of elements turns by one angle, so the tables' halves are equal.
    cosines, sines = (table[:, :, None, :half] for table in (cosines, sines))
    turned = (first * cosines).addcmul_(second, sines, value=-1)
    second.mul_(cosines).addcmul_(first, sines)
    first.copy_(turned)
    return heads

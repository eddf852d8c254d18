"""The least time a machine could need: multiplications that cannot be avoided, at its best rate.

Decides what is counted. A head is computed once per query, nothing is padded, the last layer needs
queries, output and MLP for the last token of each document alone, and of the vocabulary two rows.
Attention counts the keys that each token sees. Everything else (norms, rotations, activations,
tokenization) counts as nothing, so no program reaches the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen3_reranker.model.cpu_trials import prepacking_pays
from qwen3_reranker.model.prepacked import prepacked

ROWS = (128, 256, 512, 1024, 2048)
"""Numbers of tokens at which the rate is measured; the best one counts."""


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of the linear layers of a decoder layer."""
    hidden, size = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    return {
        "q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden),
        "gate": (hidden, config.intermediate_size), "up": (hidden, config.intermediate_size),
        "down": (config.intermediate_size, hidden),
    }  # fmt: skip


def least_flops(config: Any, layers: int, head: int, documents: Sequence[int]) -> float:
    """Return the floating-point operations of one query's documents.

    Args:
        config: Of the decoder.
        layers: Decoder layers.
        head: Tokens of the query's head.
        documents: Tokens of each document, suffix included.
    """
    shapes = linear_shapes(config)
    per_token = {name: 2 * inputs * outputs for name, (inputs, outputs) in shapes.items()}
    tokens = head + sum(documents)
    key_values = per_token["k"] + per_token["v"]
    linear = (layers - 1) * tokens * sum(per_token.values())
    linear += tokens * key_values + len(documents) * (sum(per_token.values()) - key_values)
    # Two products of head size per query head and visible key.
    per_key = 4 * config.num_attention_heads * config.head_dim
    seen = head * (head + 1) / 2 + sum(n * head + n * (n + 1) / 2 for n in documents)
    last = sum(head + n for n in documents)
    return float(linear + per_key * ((layers - 1) * seen + last))


@torch.inference_mode()
def best_rate(
    config: Any, dtype: torch.dtype, device: str, now: Callable[[], float], rounds: int = 5
) -> tuple[float, int]:
    """Return the best rate of the layer's matrices in FLOP/s, and the tokens it was found at.

    Packed where that pays, so that it is the machine's rate and not a library's.
    """
    shapes = list(linear_shapes(config).values())
    make = prepacked if device == "cpu" and prepacking_pays(dtype) else torch.nn.Identity()
    layers = [
        make(torch.nn.Linear(*shape, bias=False, device=device, dtype=dtype)) for shape in shapes
    ]
    best, best_rows = 0.0, 0
    for rows in ROWS:
        inputs = {n: torch.randn(rows, n, device=device).to(dtype) for n, _ in shapes}
        for _ in range(rounds):
            start = now()
            for layer, (width, _) in zip(layers, shapes, strict=True):
                layer(inputs[width])
            rate = 2 * rows * sum(a * b for a, b in shapes) / (now() - start)
            if rate > best:
                best, best_rows = rate, rows
    return best, best_rows
